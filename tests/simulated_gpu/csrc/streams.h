// Streams and events. In deferred mode, work waits in the queue of its stream until somebody needs it.
//
// A queue is as lazy as the rules allow: its work runs when the host waits for the stream, when another stream waits for
// an event after it, or when the queue is full. A program that relies on work that it hasn't waited for therefore reads
// what was there before. In the other mode, work runs when it is launched.
#pragma once
#include <functional>
#include <vector>

#include "memory.h"

namespace simulated {

// The first `count` entries of a stream's queue.
struct Position {
  Place place;
  uint64_t count = 0;
};

struct Task {
  std::function<void()> run;
  std::vector<BlockPtr> uses;  // the memory that it is known to touch
  std::vector<Position> waits;  // before it runs
};

struct Event {
  Position position;
  int64_t capture = 0;  // the number of the capture that it was recorded in, or 0
  uint64_t launches = 0;  // of its stream in that capture
};

void submit(Place place, Task task);  // deferred mode alone
void finish(Place place);  // the host waits
void finish(const Event& event);
void finish_device(c10::DeviceIndex device);
bool advance(Place place);  // a query: one entry runs, so that a loop of queries ends; whether all is done
bool advance(const Event& event);
void record_event(Event& event, Place place);
void wait_for_event(const Event& event, Place place);
// The storage of a block is gone: the block is poison once its own stream, and the recorded ones, have come this far.
void release_in_order(const BlockPtr& block);

// One thread at a time runs work that is deferred. Who holds Python's lock gives it up while waiting, since that work
// may need it.
class RunLock {
 public:
  RunLock();
  ~RunLock();
  RunLock(const RunLock&) = delete;
};

}  // namespace simulated
