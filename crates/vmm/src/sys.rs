//! The only unsafe code of this crate.
#![expect(
    unsafe_code,
    reason = "what has to be done between fork and exec, and with raw descriptors, is offered only unsafely"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::os::unix::thread::JoinHandleExt;
use std::process::Command;
use std::thread::JoinHandle;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Lets the child of `command` inherit `fds` under their own numbers, and die with the *thread*
/// that starts it (prctl(2), `PR_SET_PDEATHSIG`).
///
/// Keeping the numbers avoids dup2(2), which could overwrite the descriptor through which std
/// reports a failed exec. The close-on-exec flag is cleared only in the child, so a process that
/// another thread starts meanwhile inherits none of them.
///
/// With `small_pages` the child has no transparent huge pages (prctl(2), `PR_SET_THP_DISABLE`).
pub(crate) fn adopt(command: &mut Command, fds: Vec<OwnedFd>, small_pages: bool) {
    let parent = getpid();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed (signal-safety(7)).
    // The closure makes plain system calls (prctl, getppid, fcntl) on values it owns, and allocates
    // nothing: an `io::Error` made of an error number holds only an integer. This prctl takes numbers.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the request was in place.
            if getppid() != Some(parent) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            if small_pages {
                // The arguments after the second must be 0.
                let off = libc::prctl(libc::PR_SET_THP_DISABLE, 1_u64, 0_u64, 0_u64, 0_u64);
                if off != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            for fd in &fds {
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        });
    }
}

/// Watches a descriptor for having something to read.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always names the same open descriptor until it is dropped, and `AsyncFd`
    // deregisters before it drops it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// The processor's time-stamp counter, read after all earlier instructions are done.
pub(crate) fn read_tsc() -> u64 {
    use std::arch::x86_64::{_mm_lfence, _rdtsc};
    // SAFETY: both instructions exist on every x86-64 processor and touch no memory. A process may
    // be forbidden to read the counter (prctl(2), `PR_SET_TSC`), which only its own code does.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

const PAGE_BYTES: usize = 4096;

/// Guest memory, aligned as KVM wants it.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// A machine of one virtual CPU. Its fields are dropped in this order, so that the memory outlives
/// everything that could touch it.
pub(crate) struct Machine {
    pub(crate) vcpu: VcpuFd,
    _vm: VmFd,
    _memory: Box<[Page]>,
}

impl Machine {
    /// Gives `vm` a memory of `pages` pages from address 0 that holds `contents` at their
    /// addresses, and a virtual CPU.
    pub(crate) fn new(
        vm: VmFd,
        pages: usize,
        contents: &[(usize, &[u8])],
    ) -> Result<Machine, kvm_ioctls::Error> {
        let mut memory = vec![Page([0; PAGE_BYTES]); pages].into_boxed_slice();
        for &(address, bytes) in contents {
            for (at, &byte) in (address..).zip(bytes) {
                memory[at / PAGE_BYTES].0[at % PAGE_BYTES] = byte;
            }
        }
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: (pages * PAGE_BYTES) as u64,
            userspace_addr: memory.as_mut_ptr() as u64,
        };
        // SAFETY: the region is exactly the heap block that `memory` owns. It is kept, unmoved and
        // untouched, in the machine until the last descriptor of the VM is closed.
        unsafe { vm.set_user_memory_region(region) }?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Machine {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// What KVM says about an internal error: its kind, and data whose meaning depends on that.
    pub(crate) fn internal_error(&mut self) -> (u32, Vec<u64>) {
        // SAFETY: the union is plain integers in all its variants, so that any of them may be read;
        // which one was written matters only for the sense of the answer.
        let internal = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal };
        let data = internal.data.iter().take(internal.ndata as usize);
        (internal.suberror, data.copied().collect())
    }
}

/// The signal that interrupts a virtual CPU. It is blocked in the thread that runs one and let
/// through only inside KVM_RUN, which it ends (api.rst, `KVM_SET_SIGNAL_MASK`); so it needs no
/// handler, and nothing changes for the rest of the process.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Prepares the calling thread to run `vcpu` until [`kick`].
pub(crate) fn be_kickable(vcpu: &VcpuFd) -> io::Result<()> {
    #[repr(C)]
    struct SignalMask {
        len: u32,
        blocked: [u8; 8],
    }
    /// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`; the mask's flexible array does not count.
    const KVM_SET_SIGNAL_MASK: libc::Ioctl = 0x4004_ae8b;

    let kick = kick_signal();
    // SAFETY: the set is a plain value, made empty before use; the call changes this thread only.
    let blocked = unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, kick);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    let all_but_kick = !(1_u64 << (kick - 1));
    let mask = SignalMask {
        len: 8,
        blocked: all_but_kick.to_le_bytes(),
    };
    // SAFETY: the descriptor is a virtual CPU and the argument a mask of the length it states; the
    // kernel only reads it, during the call.
    let set = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Ends the KVM_RUN of a thread that has called [`be_kickable`], now or when it comes to it.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: an unjoined thread has a valid handle even after it ended; the C library then does
    // nothing. In its life before the block, the thread runs no KVM_RUN, and is not kicked.
    unsafe {
        libc::pthread_kill(thread.as_pthread_t(), kick_signal());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    /// A private mapping of the beginning of a file (mmap(2), `MAP_PRIVATE`).
    pub(crate) struct PrivateMap {
        start: *mut u8,
        bytes: usize,
    }

    impl PrivateMap {
        pub(crate) fn new(file: &File, bytes: usize) -> PrivateMap {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the kernel chooses the place, so nothing that is there is replaced.
            let start = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    protection,
                    libc::MAP_PRIVATE,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert_ne!(start, libc::MAP_FAILED);
            PrivateMap {
                start: start.cast(),
                bytes,
            }
        }

        pub(crate) fn address(&self) -> u64 {
            self.start as u64
        }

        pub(crate) fn read(&self, at: usize) -> u8 {
            assert!(at < self.bytes);
            // SAFETY: within the mapping, which lives as long as this, and of a file that is not cut.
            unsafe { self.start.add(at).read_volatile() }
        }

        pub(crate) fn write(&self, at: usize, byte: u8) {
            assert!(at < self.bytes);
            // SAFETY: as above; the mapping is writable, and nobody holds a reference into it.
            unsafe { self.start.add(at).write_volatile(byte) }
        }
    }

    impl Drop for PrivateMap {
        fn drop(&mut self) {
            // SAFETY: the mapping that was made, once.
            unsafe { libc::munmap(self.start.cast(), self.bytes) };
        }
    }
}
