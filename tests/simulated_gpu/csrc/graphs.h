// CUDA graphs: the launches of a capture, which a replay repeats.
#pragma once
#include <cstdint>
#include <memory>

#include "memory.h"
#include "streams.h"

namespace simulated {

struct Recorded {  // one launch
  virtual ~Recorded() = default;
  virtual void run() = 0;
  virtual bool draws() const { return false; }  // random numbers
};
using Launch = std::shared_ptr<Recorded>;

bool is_capturing();
bool is_capturing(Place place);
// Raises, and spoils the capture.
[[noreturn]] void refuse_in_capture(const char* what);
void capture(Launch launch, Place place);
void keep_in_graph(const BlockPtr& block);
void note_recorded(Event& event, Place place);
void note_wait(const Event& event, Place place);

int64_t begin_capture();
void end_capture();
void replay(int64_t graph);
void reset_graph(int64_t graph);
int64_t graph_size(int64_t graph);

}  // namespace simulated
