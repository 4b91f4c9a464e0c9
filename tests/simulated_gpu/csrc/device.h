// Devices, their current streams and their generators.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/GeneratorImpl.h>

#include "memory.h"

namespace at {
struct Generator;
}

namespace simulated {

constexpr int MAX_DEVICES = 16;

int device_count();
void start();  // the first use; processes that are forked after it can't use the devices
bool is_in_bad_fork();
bool deferred();  // whether work waits in its stream until somebody needs it
c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex device);
// The current stream of a device in this thread; the device -1 is the current one.
Place current_place(c10::DeviceIndex device = -1);
void set_current_stream(Place place);

enum class SyncDebug { OFF, WARN, ERROR };
void set_sync_debug(int mode);
int sync_debug();
// The host is about to wait for a stream: an error in a capture, and in the sync debug mode "error".
void host_waits(const char* what);

const at::Generator& default_generator(c10::DeviceIndex device);
// A CUDA generator draws as the CPU generator inside it does.
at::Generator& inner_generator(const at::Generator& cuda);
// torch.Generator(device="cuda") makes a new generator, or while this is set, names the device's own.
void hand_out_default_generators(bool yes);
void install_device();

}  // namespace simulated
