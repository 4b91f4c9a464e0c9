#pragma once

#include "grid.h"

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % bytes != 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || misaligned(to) || misaligned(from))
    emulation::fail("an asynchronous copy of a size or alignment that hardware refuses");
  emulation::Grid::current->fiber().open.push_back({to, from, bytes});
}

inline void __pipeline_commit() {
  auto& fiber = emulation::Grid::current->fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void __pipeline_wait_prior(std::size_t left) {
  auto& groups = emulation::Grid::current->fiber().groups;
  for (; groups.size() > left; groups.pop_front())
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
