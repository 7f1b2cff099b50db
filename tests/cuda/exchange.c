/* Tensors of a processor that say they are on a GPU: the table by which torch hands out its tensors
 * (DLPackExchangeAPI), changed so that opdc sends what it does with them to the emulated device. */
#include <dlpack/dlpack.h>
#include <stddef.h>

#include "emulation.h"

#define SEEN __attribute__((visibility("default")))

/* The settings of a call (opdc.h) stay on the processor: the tensor that is there. */
SEEN void emulation_settings_at(const void *address);
static const void *settings;
void emulation_settings_at(const void *address) { settings = address; }

static DLDevice emulated_device = {kDLCUDA, 0};
static const DLPackExchangeAPI *real;

static int tensor_of(void *object, DLTensor *out) {
  const int failed = real->dltensor_from_py_object_no_sync(object, out);
  if (!failed && out->device.device_type == kDLCPU && (!settings || out->data != settings))
    out->device = emulated_device;
  return failed;
}

static int allocate(DLTensor *prototype, DLManagedTensorVersioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message)) {
  DLTensor plain = *prototype;
  int64_t bytes;
  plain.device = (DLDevice){kDLCPU, 0};
  if (real->managed_tensor_allocator(&plain, out, context, set_error) != 0) return -1;
  bytes = (plain.dtype.bits + 7) / 8;
  for (int i = 0; i < plain.ndim; i++) bytes *= plain.shape[i];
  emulation_poison((*out)->dl_tensor.data, (size_t)bytes);
  (*out)->dl_tensor.device = emulated_device;
  return 0;
}

static int stream_of(DLDeviceType type, int32_t device, void **out) {
  *out = type == kDLCUDA ? emulation_stream(device) : NULL;
  return 0;
}

/* The table that takes the place of `of`, for one of the devices. */
SEEN const DLPackExchangeAPI *emulation_exchange_api(const DLPackExchangeAPI *of, int device);
const DLPackExchangeAPI *emulation_exchange_api(const DLPackExchangeAPI *of, int device) {
  static DLPackExchangeAPI changed;
  emulated_device.device_id = device;
  real = of;
  changed = *of;
  changed.dltensor_from_py_object_no_sync = tensor_of;
  changed.managed_tensor_allocator = allocate;
  changed.current_work_stream = stream_of;
  return &changed;
}
