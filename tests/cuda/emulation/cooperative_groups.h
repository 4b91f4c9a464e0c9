#pragma once

#include "grid.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulation::Grid::current->wait(emulation::Grid::current->barrier); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
