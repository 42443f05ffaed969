//! The contract of [`smolvm_vmm::contract`], against the fake and against QEMU.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use smolvm_vmm::contract::{Guest, Subject, payload};
use smolvm_vmm::{Accel, Backend, VmPlan};

mod fake {
    use super::*;
    use smolvm_vmm::Exit;
    use smolvm_vmm::fake::{Fake, FakeGuest, GuestEnd};
    use std::io::{Read, Write};

    smolvm_vmm::contract_tests!(FakeSubject::new());

    struct FakeSubject {
        fake: Fake,
        files: Files,
    }

    impl FakeSubject {
        fn new() -> Self {
            FakeSubject {
                fake: Fake::new(guest),
                files: Files::new(),
            }
        }
    }

    /// Behaves as the kernel's file name says.
    fn guest(mut machine: FakeGuest) -> GuestEnd {
        let named = |guest: &Guest| machine.plan.kernel.ends_with(Files::kernel_name(*guest));
        let guest = Guest::ALL.into_iter().find(named).expect("a guest");
        let mut say = || writeln!(machine.console, "{}", guest.line());
        match guest {
            Guest::Halts => {
                let _ = say();
                let _ = machine.channel.read_to_end(&mut Vec::new());
            }
            Guest::Ticks => while say().is_ok() {},
            Guest::Resets => {
                let _ = say();
            }
        }
        GuestEnd::Off
    }

    impl Subject for FakeSubject {
        fn backend(&self) -> &dyn Backend {
            &self.fake
        }

        fn plan(&self, guest: Guest) -> VmPlan {
            self.files.plan(guest, PathBuf::from("/fake"))
        }

        fn exists(&self, pid: u32) -> bool {
            self.fake.running().contains(&pid)
        }

        fn kill_from_outside(&self, pid: u32) {
            let exit = Exit {
                code: None,
                signal: Some(9),
                stderr: String::new(),
            };
            self.fake.end(pid, exit);
        }
    }
}

mod qemu {
    use super::*;
    use rustix::process::{Pid, Signal, kill_process};
    use smolvm_vmm::qemu::{self, Qemu};

    smolvm_vmm::contract_tests!(QemuSubject::new());

    pub(crate) struct QemuSubject {
        program: PathBuf,
        files: Files,
    }

    impl QemuSubject {
        pub(crate) fn new() -> Self {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let program = qemu::find(std::env::split_paths(&path)).unwrap_or_else(|| {
                panic!(
                    "these tests need {}; on Debian: apt install qemu-system-x86",
                    qemu::PROGRAM
                )
            });
            QemuSubject {
                program,
                files: Files::new(),
            }
        }
    }

    pub(crate) fn pid(number: u32) -> Pid {
        Pid::from_raw(number.cast_signed()).expect("a process number")
    }

    impl Subject for QemuSubject {
        fn backend(&self) -> &dyn Backend {
            &Qemu
        }

        fn plan(&self, guest: Guest) -> VmPlan {
            self.files.plan(guest, self.program.clone())
        }

        fn exists(&self, number: u32) -> bool {
            PathBuf::from(format!("/proc/{number}")).exists()
        }

        fn kill_from_outside(&self, number: u32) {
            kill_process(pid(number), Signal::KILL).expect("kill");
        }
    }
}

/// The kernels of the tests' guests, in a directory that goes when the test ends.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        let directory = tempfile::tempdir().expect("a directory");
        for guest in Guest::ALL {
            let path = directory.path().join(Files::kernel_name(guest));
            std::fs::write(path, payload::kernel(guest)).expect("a kernel");
        }
        std::fs::write(directory.path().join("initrd"), "no more than a file").expect("an initrd");
        Files(directory)
    }

    fn kernel_name(guest: Guest) -> String {
        format!("{guest:?}.elf")
    }

    fn plan(&self, guest: Guest, program: PathBuf) -> VmPlan {
        static MACHINES: AtomicU32 = AtomicU32::new(0);
        VmPlan {
            name: format!("contract-{}", MACHINES.fetch_add(1, Ordering::Relaxed)),
            program,
            accel: Accel::Emulation,
            cpus: 1,
            memory_mib: 64,
            kernel: self.0.path().join(Files::kernel_name(guest)),
            initrd: self.0.path().join("initrd"),
            cmdline: String::new(),
            disks: Vec::new(),
            tsc_khz: Some(1_000_000),
        }
    }
}
