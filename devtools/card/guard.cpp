// What torch's C++ asks a card's driver for, answered for a card in host memory.
//
// One device, one stream, nothing to wait for. Streams of the emulated card are known to Python only (streams.py).
//
// torch asks in two places. Autograd's engine and the dispatcher ask the device guard, which is registered per device type.
// Everything else asks the hooks, which torch has made by the time this library is loaded; those of a machine without a card
// try to start a driver.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/AcceleratorHooksInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <iterator>
#include <map>
#include <mutex>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kCard(DeviceType::CUDA, 0);
const Stream kStream(Stream::DEFAULT, kCard);

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kCard; }
  Device getDevice() const override { return kCard; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }

  Stream getStream(Device) const override { return kStream; }
  Stream getDefaultStream(Device) const override { return kStream; }
  Stream getNewStream(Device, int) const override { return kStream; }
  Stream exchangeStream(Stream) const override { return kStream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

// The CPU's random numbers under the name of a card: kernels.py hands its state to a generator of the CPU and back.
struct CardGenerator final : at::CPUGeneratorImpl {
  explicit CardGenerator(uint64_t seed = c10::default_rng_seed_val) : CPUGeneratorImpl(seed) {
    device_ = kCard;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
};

// Page-locked ranges of host memory, by address. pinned.py decides what is in here.
std::mutex pinned_lock;
std::map<uintptr_t, size_t> pinned;

bool is_pinned(uintptr_t address) {
  const std::lock_guard<std::mutex> lock(pinned_lock);
  const auto behind = pinned.upper_bound(address);
  if (behind == pinned.begin()) return false;
  const auto& [start, size] = *std::prev(behind);
  return address < start + size;
}

struct CardHooks final : at::CUDAHooksInterface {
  explicit CardHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(reinterpret_cast<uintptr_t>(data)); }
  bool compiledWithCuDNN() const override { return false; }
  bool compiledWithMIOpen() const override { return false; }
  void deviceSynchronize(DeviceIndex) const override {}
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<CardGenerator>(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<CardGenerator>();
    return generator;
  }
};

}  // namespace

extern "C" void install_card_guard() {
  static CardGuard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  // torch keeps its hooks for good and asks for them only once. Both classes have no members, so an object of one becomes
  // an object of the other by its table of virtual functions.
  static CardHooks card{at::CUDAHooksArgs{}};
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&hooks) = *reinterpret_cast<void**>(&card);
  at::globalContext().lazyInitDevice(DeviceType::CUDA);  // before that no memory is pinned for torch
}

extern "C" bool card_guard_is_installed() {
  return at::detail::getCUDAHooks().hasPrimaryContext(0);
}

extern "C" void note_pinned(uintptr_t address, size_t size) {
  const std::lock_guard<std::mutex> lock(pinned_lock);
  pinned[address] = size;
}

extern "C" void note_unpinned(uintptr_t address) {
  const std::lock_guard<std::mutex> lock(pinned_lock);
  pinned.erase(address);
}
