"""Result files as tables, documents and charts."""
