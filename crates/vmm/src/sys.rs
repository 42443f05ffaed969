//! The only unsafe code of this crate.
#![expect(
    unsafe_code,
    reason = "what has to be done between fork and exec, and with raw descriptors, is offered only unsafely"
)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::os::unix::thread::JoinHandleExt;
use std::process::Command;
use std::thread::JoinHandle;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// Lets the child of `command` inherit `fds` under their own numbers, and die with the *thread*
/// that starts it (prctl(2), `PR_SET_PDEATHSIG`).
///
/// Keeping the numbers avoids dup2(2), which could overwrite the descriptor through which std
/// reports a failed exec. The close-on-exec flag is cleared only in the child, so a process that
/// another thread starts meanwhile inherits none of them.
///
/// With `small_pages` the child has no transparent huge pages (prctl(2), `PR_SET_THP_DISABLE`).
///
/// With `seclusion` the child finds what that says.
pub(crate) fn adopt(
    command: &mut Command,
    fds: Vec<OwnedFd>,
    small_pages: bool,
    seclusion: Option<Seclusion>,
) {
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
            if let Some(seclusion) = &seclusion {
                seclusion.enter()?;
            }
            for fd in &fds {
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        });
    }
}

/// Namespaces of a child's own: IPC, host name, mounts, and network unless it is to have this one.
#[derive(Debug)]
pub(crate) struct Seclusion {
    /// Whether it stays in the network namespace of this process.
    pub(crate) network: bool,
    /// What is mounted in its mount namespace.
    pub(crate) binds: Vec<Bind>,
}

/// A file or directory that has a second place.
#[derive(Debug)]
pub(crate) struct Bind {
    pub(crate) source: CString,
    /// Of the same kind as the source, and there.
    pub(crate) target: CString,
    pub(crate) read_only: bool,
}

impl Seclusion {
    /// Makes system calls, and nothing else: it runs between fork and exec.
    fn enter(&self) -> io::Result<()> {
        let mut namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        if !self.network {
            namespaces |= libc::CLONE_NEWNET;
        }
        // SAFETY: numbers only. The child has one thread, and shares nothing that this would divide.
        done(unsafe { libc::unshare(namespaces) })?;
        mount(None, c"/", libc::MS_REC | libc::MS_SLAVE)?;
        for bind in &self.binds {
            mount(Some(&bind.source), &bind.target, libc::MS_BIND)?;
            if bind.read_only {
                let again = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID;
                mount(None, &bind.target, again | libc::MS_NODEV)?;
            }
        }
        Ok(())
    }
}

fn mount(source: Option<&CStr>, target: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map_or(std::ptr::null(), CStr::as_ptr);
    let none = std::ptr::null();
    // SAFETY: strings that end, for as long as the call takes; the other pointers may be null for these
    // flags (mount(2)).
    done(unsafe { libc::mount(source, target.as_ptr(), none, flags, none.cast()) })
}

fn done(returned: libc::c_int) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What ends a process when this one ends, however that comes: kept for as long as the process is to live.
///
/// Two sockets that are connected with each other. When this process ends they are closed one after the
/// other, and the first makes the kernel signal the owner of the second, which is that process (fcntl(2),
/// `F_SETOWN` and `F_SETSIG`). It holds where `PR_SET_PDEATHSIG` does not: for a process that changes its
/// user. A later process of the same number is not meant: the kernel knows it by more than that. The first
/// process of a PID namespace would not be ended: it is deaf to signals that no process sent.
#[derive(Debug)]
pub(crate) struct Leash(
    #[expect(dead_code, reason = "they are there to be closed")] [UnixStream; 2],
);

impl Leash {
    pub(crate) fn new(pid: Pid) -> io::Result<Leash> {
        let ends = UnixStream::pair()?;
        let ends = [ends.0, ends.1];
        for end in &ends {
            let fd = end.as_raw_fd();
            let flags = rustix::fs::fcntl_getfl(end)?.bits();
            let flags = libc::c_int::try_from(flags).map_err(io::Error::other)?;
            // SAFETY: numbers only, for a descriptor that is open. Nothing is ever written to the sockets,
            // so that nothing but their end makes the kernel send the signal.
            let set = unsafe {
                [
                    libc::fcntl(fd, libc::F_SETOWN, pid.as_raw_nonzero().get()),
                    libc::fcntl(fd, F_SETSIG, libc::SIGKILL),
                    libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC),
                ]
            };
            if set.contains(&-1) {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Leash(ends))
    }
}

/// fcntl(2); asm-generic/fcntl.h.
const F_SETSIG: libc::c_int = 10;

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
