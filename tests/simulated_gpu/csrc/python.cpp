// What Python asks for, by ctypes. A function that may fail returns its message, or null.
#include "python.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <string>

#include "device.h"
#include "graphs.h"
#include "streams.h"

namespace simulated {
namespace {
using Call = int (*)(int64_t);
std::atomic<Call> call{nullptr}, drop{nullptr};

template <class Function>
const char* message_of(Function function) {
  thread_local std::string message;
  try {
    function();
    return nullptr;
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

c10::DeviceIndex index(int device) { return static_cast<c10::DeviceIndex>(device < 0 ? current_device() : device); }
}  // namespace

void call_python(int64_t number) {
  const Call function = call;
  TORCH_CHECK(function && !function(number), "a Triton kernel failed (simulated); its traceback was printed");
}

void drop_python(int64_t number) {
  if (const Call function = drop) function(number);
}
}  // namespace simulated

using namespace simulated;

extern "C" {
void sim_set_callbacks(int (*on_call)(int64_t), int (*on_drop)(int64_t)) {
  call = on_call;
  drop = on_drop;
}
void sim_start() { start(); }
int sim_is_in_bad_fork() { return is_in_bad_fork(); }
int sim_deferred() { return deferred(); }
int sim_device_count() { return device_count(); }
int sim_get_device() { return current_device(); }
const char* sim_set_device(int device) {
  return message_of([=] { set_current_device(static_cast<c10::DeviceIndex>(device)); });
}
void sim_hand_out_default(int yes) { hand_out_default_generators(yes != 0); }

int64_t sim_get_stream(int device) { return current_place(index(device)).stream; }
void sim_set_stream(int device, int64_t stream) { set_current_stream({index(device), stream}); }
const char* sim_synchronize(int device) {
  return message_of([=] {
    if (is_capturing()) refuse_in_capture("the host waits for the device");
    finish_device(index(device));
  });
}
void sim_set_sync_debug(int mode) { set_sync_debug(mode); }
int sim_get_sync_debug() { return sync_debug(); }

int64_t sim_live_bytes(int device) { return statistics(index(device)).bytes; }
int64_t sim_peak_bytes(int device) { return statistics(index(device)).peak_bytes; }
int64_t sim_live_blocks(int device) { return statistics(index(device)).blocks; }
void sim_reset_peak(int device) { reset_peak(index(device)); }

int sim_capturing() { return is_capturing(current_place()); }
int sim_any_capturing() { return is_capturing(); }
const char* sim_graph_begin(int64_t* graph) {
  return message_of([=] {
    for (int device = 0; device < device_count(); ++device) finish_device(static_cast<c10::DeviceIndex>(device));
    *graph = begin_capture();
  });
}
const char* sim_graph_end() { return message_of([] { end_capture(); }); }
const char* sim_graph_replay(int64_t graph) { return message_of([=] { replay(graph); }); }
void sim_graph_reset(int64_t graph) { reset_graph(graph); }
int64_t sim_graph_size(int64_t graph) { return graph_size(graph); }
}
