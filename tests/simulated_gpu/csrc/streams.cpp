#include "streams.h"

#include <c10/util/Exception.h>

#include <deque>
#include <map>
#include <optional>
#include <string>

#include "device.h"
#include "graphs.h"

extern "C" {  // of the Python that runs this process
int PyGILState_Check();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace simulated {
namespace {

constexpr size_t FULL = 1024;  // launches that a GPU takes before the host has to wait

struct Queue {
  std::deque<Task> tasks;
  uint64_t done = 0;
  bool running = false;
  uint64_t launched() const { return done + (running ? 1 : 0) + tasks.size(); }
};

std::recursive_mutex run_mutex;
std::mutex queue_mutex;  // for a moment only: nothing runs under it, nothing is destroyed under it
std::map<Place, Queue> queues;
std::string failure;  // of deferred work; the next wait reports it

Position now(Place place) {
  std::lock_guard<std::mutex> lock(queue_mutex);
  return {place, queues[place].launched()};
}

std::optional<Task> next(const Position& until) {
  std::lock_guard<std::mutex> lock(queue_mutex);
  Queue& queue = queues[until.place];
  if (queue.running || queue.done >= until.count || queue.tasks.empty()) return std::nullopt;
  Task task = std::move(queue.tasks.front());
  queue.tasks.pop_front();
  queue.running = true;
  return task;
}

bool is_done(const Position& position) {
  std::lock_guard<std::mutex> lock(queue_mutex);
  return queues[position.place].done >= position.count;
}

void run_until(const Position& until);

// Memory that was freed on its own stream and is used here without record_stream: its stream gets ahead, if it can.
void let_others_reuse(const Task& task, Place place) {
  for (const BlockPtr& block : task.uses) {
    uint64_t released;
    {
      std::lock_guard<std::mutex> lock(block->mutex);
      released = block->released;
    }
    if (released && !(block->owner == place)) run_until({block->owner, released});
  }
}

void run_task(Task& task, Place place) {
  for (const Position& wait : task.waits) run_until(wait);
  let_others_reuse(task, place);
  try {
    if (task.run) task.run();
  } catch (const std::exception& error) {
    std::lock_guard<std::mutex> lock(queue_mutex);
    if (failure.empty()) failure = error.what();
  }
}

bool ready(const Task& task) {
  for (const Position& wait : task.waits) {
    std::lock_guard<std::mutex> lock(queue_mutex);
    const Queue& queue = queues[wait.place];
    if (queue.running && queue.done < wait.count) return false;
  }
  return true;
}

void put_back(Task task, Place place) {
  std::lock_guard<std::mutex> lock(queue_mutex);
  Queue& queue = queues[place];
  queue.tasks.push_front(std::move(task));
  queue.running = false;
}

// Stops early at work that waits for a stream whose work is running now.
void run_until(const Position& until) {
  while (auto task = next(until)) {
    if (!ready(*task)) {
      put_back(std::move(*task), until.place);
      return;
    }
    run_task(*task, until.place);
    std::lock_guard<std::mutex> lock(queue_mutex);
    Queue& queue = queues[until.place];
    queue.running = false;
    ++queue.done;
  }
}

void report_failure() {
  std::string said;
  {
    std::lock_guard<std::mutex> lock(queue_mutex);
    said.swap(failure);
  }
  TORCH_CHECK(said.empty(), "CUDA error: work that was launched before failed (simulated): ", said);
}

void finish(const Position& position) {
  if (!deferred()) return;
  RunLock lock;
  run_until(position);
  report_failure();
}

bool advance(const Position& position) {
  if (!deferred() || is_done(position)) return true;
  RunLock lock;
  uint64_t done;
  {
    std::lock_guard<std::mutex> inner(queue_mutex);
    done = queues[position.place].done;
  }
  run_until({position.place, std::min(done + 1, position.count)});
  return is_done(position);
}
}  // namespace

RunLock::RunLock() {
  if (run_mutex.try_lock()) return;
  void* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  run_mutex.lock();
  if (state) PyEval_RestoreThread(state);
}

RunLock::~RunLock() { run_mutex.unlock(); }

void submit(Place place, Task task) {
  bool full;
  {
    std::lock_guard<std::mutex> lock(queue_mutex);
    Queue& queue = queues[place];
    queue.tasks.push_back(std::move(task));
    full = queue.tasks.size() > FULL;
  }
  if (full) {
    RunLock lock;
    run_until({place, now(place).count - FULL / 2});
  }
}

void finish(Place place) { finish(now(place)); }
void finish(const Event& event) { finish(event.position); }

void finish_device(c10::DeviceIndex device) {
  std::vector<Place> places;
  {
    std::lock_guard<std::mutex> lock(queue_mutex);
    for (auto& [place, queue] : queues)
      if (place.device == device) places.push_back(place);
  }
  for (Place place : places) finish(place);
}

bool advance(Place place) { return advance(now(place)); }
bool advance(const Event& event) { return advance(event.position); }

void record_event(Event& event, Place place) {
  event.position = now(place);
  note_recorded(event, place);
}

void wait_for_event(const Event& event, Place place) {
  note_wait(event, place);
  if (!deferred() || is_capturing() || event.position.place == place || is_done(event.position)) return;
  submit(place, {{}, {}, {event.position}});
}

void release_in_order(const BlockPtr& block) {
  Task task{[block] { block->poison(); }, {}, {}};
  std::lock_guard<std::mutex> state(block->mutex);
  std::lock_guard<std::mutex> lock(queue_mutex);
  for (Place place : block->recorded) task.waits.push_back({place, queues[place].launched()});
  Queue& queue = queues[block->owner];
  if (queue.tasks.empty() && !queue.running && task.waits.empty() && block.use_count() <= 2) return;  // and `task`
  block->released = queue.launched() + 1;
  queue.tasks.push_back(std::move(task));
}

}  // namespace simulated
