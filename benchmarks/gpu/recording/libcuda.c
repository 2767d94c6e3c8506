/* A CUDA driver that counts what it is asked to load and launch, and does nothing else. See __init__.py. */
#include <stdint.h>
#include "cuda.h"

static long launches, loads;
long recorded_launches(void) { return launches; }
long recorded_loads(void) { return loads; }

#define DO_NOTHING(NAME, ...) CUresult NAME(__VA_ARGS__) { return CUDA_SUCCESS; }
DO_NOTHING(cuInit, unsigned flags)
DO_NOTHING(cuCtxSetCurrent, CUcontext context)
DO_NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
DO_NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
DO_NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache cache)
DO_NOTHING(cuModuleUnload, CUmodule module)

#define ANSWER(NAME, TYPE, VALUE, ...) CUresult NAME(TYPE* answer, ##__VA_ARGS__) { *answer = VALUE; return CUDA_SUCCESS; }
ANSWER(cuCtxGetCurrent, CUcontext, (CUcontext)1)
ANSWER(cuCtxGetLimit, size_t, 0, CUlimit limit)
ANSWER(cuCtxGetDevice, CUdevice, 0)
ANSWER(cuDeviceGet, CUdevice, 0, int ordinal)
ANSWER(cuDeviceGetCount, int, 1)
ANSWER(cuDevicePrimaryCtxRetain, CUcontext, (CUcontext)1, CUdevice device)
ANSWER(cuDriverGetVersion, int, 13000)
ANSWER(cuModuleGetFunction, CUfunction, (CUfunction)1, CUmodule module, const char* name)
ANSWER(cuFuncGetAttribute, int, attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0,
       CUfunction_attribute attribute, CUfunction function)
ANSWER(cuOccupancyMaxActiveClusters, int, 1, CUfunction function, const CUlaunchConfig* config)

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "an error of the recording driver";
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) { return cuCtxGetCurrent(context); }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

/* An H200's. */
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

/* Memory of the CPU is where it is. */
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(uint64_t*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  loads++;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  launches++;
  return CUDA_SUCCESS;
}
