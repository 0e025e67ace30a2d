// Barriers that a test has switched off, to see that results go wrong without them.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "scheduler.h"

namespace flatkern::cuda::emulation {

class SwitchedOff {
 public:
  // `text` is "file:line,...", or empty.
  void read(const std::string& text) {
    if (readings_ > 0 && text == text_) return;
    places_.clear();
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      places_.push_back(checked(text.substr(begin, end - begin)));
      begin = end + 1;
    }
    text_ = text;
    ++readings_;
  }

  // A site looks itself up once in each reading.
  bool contains(Site& site) const {
    if (site.reading != readings_) {
      site.reading = readings_;
      site.switched_off = is_named(site);
    }
    return site.switched_off;
  }

 private:
  static std::string checked(const std::string& place) {
    const size_t colon = place.rfind(':');
    if (colon == place.npos || colon == 0 || colon + 1 == place.size() ||
        place.find_first_not_of("0123456789", colon + 1) != place.npos)
      throw std::invalid_argument("emulation: FLATKERN_EMULATION_WITHOUT names \"" + place +
                                  "\", but should name places like update.cu:123, with commas between them");
    return "/" + place;
  }

  // By the whole name of the file, with as many of its folders as are given.
  bool is_named(const Site& site) const {
    const std::string full = "/" + std::string(site.file) + ":" + std::to_string(site.line);
    return std::any_of(places_.begin(), places_.end(), [&](const std::string& place) {
      return place.size() <= full.size() && full.compare(full.size() - place.size(), place.size(), place) == 0;
    });
  }

  std::string text_;
  std::vector<std::string> places_;
  unsigned readings_ = 0;
};

}  // namespace flatkern::cuda::emulation
