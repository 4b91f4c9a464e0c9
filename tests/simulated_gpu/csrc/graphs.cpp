// CUDA graphs. A capture runs its launches, because later code may read shapes, and undoes them at its end: no
// value of a capture is there before the first replay.
#include "graphs.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstring>
#include <map>
#include <string>

#include "device.h"

namespace simulated {
namespace {

struct Graph {
  std::vector<Launch> launches;
  std::vector<BlockPtr> pool;
  bool whole = false;  // captured to its end
};

struct Branch {  // of a capture: a stream
  uint64_t launches = 0;
  uint64_t joined = 0;  // so many of them are before something on another stream of the capture
};

struct Capture {
  int64_t number = 0;
  Place origin;
  Graph* graph = nullptr;
  std::map<Place, Branch> branches;
  std::vector<std::pair<BlockPtr, std::vector<char>>> before;
  std::vector<at::Tensor> generators;
  std::string spoiled;  // by what
};

std::recursive_mutex mutex;
std::map<int64_t, std::unique_ptr<Graph>> graphs;
int64_t last_graph = 0;
std::unique_ptr<Capture> current;
std::atomic<bool> capturing{false};

void spoil(const std::string& why) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (current && current->spoiled.empty()) current->spoiled = why;
}

void undo(const Capture& capture) {
  for (auto& [block, bytes] : capture.before) std::memcpy(block->data, bytes.data(), bytes.size());
  for (auto& block : capture.graph->pool) block->poison();
  for (size_t i = 0; i < capture.generators.size(); ++i) {
    at::Generator generator = default_generator(static_cast<c10::DeviceIndex>(i));
    generator.set_state(capture.generators[i]);
  }
}

std::string unjoined(const Capture& capture) {
  for (auto& [place, branch] : capture.branches)
    if (!(place == capture.origin) && branch.joined < branch.launches)
      return "work on stream " + std::to_string(place.stream) + ", which the capturing stream doesn't wait for";
  return "";
}
}  // namespace

bool is_capturing() { return capturing; }

bool is_capturing(Place place) {
  if (!capturing) return false;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return current && current->branches.count(place);
}

void refuse_in_capture(const char* what) {
  spoil(what);
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (simulated: ", what, ")");
}

void capture(Launch launch, Place place) {
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (!current) return;
    auto found = current->branches.find(place);
    if (found != current->branches.end()) {
      ++found->second.launches;
      current->graph->launches.push_back(std::move(launch));
      return;
    }
  }
  refuse_in_capture("a launch on a stream that isn't part of the capture: it must wait for the capturing stream first");
}

void keep_in_graph(const BlockPtr& block) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (current) current->graph->pool.push_back(block);
}

void note_recorded(Event& event, Place place) {
  event.capture = 0;
  if (!is_capturing(place)) return;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  event.capture = current->number;
  event.launches = current->branches[place].launches;
}

void note_wait(const Event& event, Place place) {
  if (!capturing || event.position.place == place) return;
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (current && event.capture == current->number) {
      current->branches[place];
      Branch& from = current->branches[event.position.place];
      from.joined = std::max(from.joined, event.launches);
      return;
    }
  }
  if (is_capturing(place)) refuse_in_capture("the capturing stream waits for work that isn't part of the capture");
}

int64_t begin_capture() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  TORCH_CHECK(!current, "CUDA error: a capture is under way already (simulated)");
  const Place origin = current_place();
  TORCH_CHECK(origin.stream != 0, "CUDA graphs must be captured on a non-default stream.");
  auto begun = std::make_unique<Capture>();
  begun->number = ++last_graph;
  begun->origin = origin;
  begun->graph = (graphs[begun->number] = std::make_unique<Graph>()).get();
  begun->branches[origin];
  for (auto& block : live_blocks()) {
    const char* data = static_cast<char*>(block->data);
    begun->before.emplace_back(block, std::vector<char>(data, data + block->bytes));
  }
  for (int i = 0; i < device_count(); ++i)
    begun->generators.push_back(default_generator(static_cast<c10::DeviceIndex>(i)).get_state());
  current = std::move(begun);
  capturing = true;
  return current->number;
}

void end_capture() {
  std::unique_ptr<Capture> ended;
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    TORCH_CHECK(current, "CUDA error: no capture is under way (simulated)");
    capturing = false;
    ended = std::move(current);
  }
  undo(*ended);
  const std::string why = ended->spoiled.empty() ? unjoined(*ended) : ended->spoiled;
  TORCH_CHECK(why.empty(), "CUDA error: the capture was invalidated (simulated) by: ", why);
  ended->graph->whole = true;
}

void replay(int64_t number) {
  std::vector<Launch> launches;
  std::vector<BlockPtr> pool;
  bool draws = false;
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    auto found = graphs.find(number);
    TORCH_CHECK(found != graphs.end() && found->second->whole, "CUDA error: this graph was not captured (simulated)");
    TORCH_CHECK(!capturing, "CUDA error: a graph is replayed during a capture (simulated)");
    launches = found->second->launches;
    pool = found->second->pool;
  }
  for (auto& launch : launches) draws |= launch->draws();
  auto run = [launches, pool] {
    for (auto& launch : launches) launch->run();
  };
  const Place place = current_place();
  if (deferred() && !draws) {
    submit(place, {run, {}, {}});
    return;
  }
  finish(place);  // the numbers that it draws are those that come next when it is launched
  run();
}

void reset_graph(int64_t number) {
  std::unique_ptr<Graph> gone;  // declared first: destroyed without the lock
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto found = graphs.find(number);
  if (found == graphs.end()) return;
  gone = std::move(found->second);
  graphs.erase(found);
}

int64_t graph_size(int64_t number) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return static_cast<int64_t>(graphs.at(number)->launches.size());
}

}  // namespace simulated
