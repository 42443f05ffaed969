//! The contract of [`smolvm_vmm::contract`], against the fake and against QEMU.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use smolvm_vmm::contract::{Guest, Subject, payload};
use smolvm_vmm::{Accel, Backend, Cable, Devices, Memory, VmPlan};

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
            Guest::Counts => {
                if machine.memory.read().is_empty()
                    && (say().is_err() || !machine.memory.write(&[0]))
                {
                    return GuestEnd::Off;
                }
                while let Ok(1) = machine.console.read(&mut [0]) {
                    let count = machine.memory.read()[0] + 1;
                    if !machine.memory.write(&[count])
                        || writeln!(machine.console, "{count}").is_err()
                    {
                        break;
                    }
                }
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

        fn count(&self, _: &str) -> usize {
            // Each test has a fake of its own, and all its machines are gone when this is asked.
            self.fake.running().len()
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

        fn count(&self, name: &str) -> usize {
            children_named(name)
        }

        fn kill_from_outside(&self, number: u32) {
            kill_process(pid(number), Signal::KILL).expect("kill");
        }
    }
}

/// Needs KVM, so these run in the KVM lab only (`cargo xtask kvm-lab`).
mod firecracker {
    use super::qemu::pid;
    use super::*;
    use rustix::process::{Signal, kill_process};
    use smolvm_vmm::firecracker::{self, Firecracker};

    smolvm_vmm::contract_tests!(
        ignore = "needs KVM and Firecracker: run by `cargo xtask kvm-lab`",
        FirecrackerSubject::new()
    );

    pub(crate) struct FirecrackerSubject {
        program: PathBuf,
        pub(crate) files: Files,
    }

    impl FirecrackerSubject {
        pub(crate) fn new() -> Self {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let program = firecracker::find(std::env::split_paths(&path))
                .unwrap_or_else(|| panic!("these tests need `{}`", firecracker::PROGRAM));
            FirecrackerSubject {
                program,
                files: Files::new(),
            }
        }
    }

    impl Subject for FirecrackerSubject {
        fn backend(&self) -> &dyn Backend {
            &Firecracker
        }

        fn plan(&self, guest: Guest) -> VmPlan {
            VmPlan {
                accel: Accel::Kvm,
                tsc_khz: None,
                ..self.files.plan(guest, self.program.clone())
            }
        }

        fn exists(&self, number: u32) -> bool {
            PathBuf::from(format!("/proc/{number}")).exists()
        }

        fn repeats(&self) -> bool {
            true
        }

        fn count(&self, name: &str) -> usize {
            children_named(name)
        }

        fn kill_from_outside(&self, number: u32) {
            kill_process(pid(number), Signal::KILL).expect("kill");
        }
    }
}

/// What is true of Firecracker alone.
mod firecracker_only {
    use super::firecracker::FirecrackerSubject;
    use super::*;
    use smolvm_vmm::firecracker::{Firecracker, is_supported, version};
    use smolvm_vmm::{VmErrorKind, contract};

    #[test]
    #[ignore = "needs KVM and Firecracker: run by `cargo xtask kvm-lab`"]
    fn the_version_is_told_and_supported() {
        let subject = FirecrackerSubject::new();
        let version = version(&subject.plan(Guest::Halts).program).expect("a version");
        assert!(is_supported(&version), "{version}");
    }

    #[test]
    #[ignore = "needs KVM and Firecracker: run by `cargo xtask kvm-lab`"]
    fn nothing_of_a_machine_is_left_in_its_directory() {
        let subject = FirecrackerSubject::new();
        let plan = subject.plan(Guest::Ticks);
        contract::run(async {
            let vm = Firecracker.start(&plan, None).await.expect("start");
            assert!(plan.directory.exists());
            drop(vm);
            assert!(!plan.directory.exists());
        });
    }

    #[test]
    #[ignore = "needs KVM and Firecracker: run by `cargo xtask kvm-lab`"]
    fn what_the_vmm_says_last_is_in_its_exit() {
        let subject = FirecrackerSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        // Not a kernel: the initial RAM file system.
        plan.kernel.clone_from(&plan.initrd);
        contract::run(async {
            let mut vm = Firecracker.start(&plan, None).await.expect("start");
            let exit = vm.wait().await.expect("wait");
            assert_ne!(exit.code, Some(0), "{exit:?}");
            assert!(exit.stderr.to_lowercase().contains("kernel"), "{exit:?}");
            let error = vm.pause().await.expect_err("pause");
            assert_eq!(error.kind, VmErrorKind::Exited);
        });
    }

    /// The state of one engine is not for another.
    #[test]
    #[ignore = "needs KVM and Firecracker: run by `cargo xtask kvm-lab`"]
    fn a_state_of_another_engine_is_refused() {
        let subject = FirecrackerSubject::new();
        let directory = tempfile::tempdir().expect("a directory");
        let [memory, state] = ["memory", "state"].map(|name| directory.path().join(name));
        let mut plan = subject.plan(Guest::Halts);
        plan.memory = Memory::File(memory.clone());
        contract::run(async {
            let mut vm = Firecracker.start(&plan, None).await.expect("start");
            vm.snapshot(&state, None).await.expect("snapshot");
            vm.kill().await.expect("kill");
            plan.memory = Memory::CopyOf(memory);
            let refused = smolvm_vmm::qemu::Qemu.restore(&plan, &state, None).await;
            let error = refused.expect_err("another engine");
            assert_eq!(error.kind, VmErrorKind::Protocol);
            let cause = std::error::Error::source(&error).expect("a cause");
            assert_eq!(
                cause.to_string(),
                "the state was written by the engine firecracker, and qemu cannot read it"
            );
        });
    }

    #[test]
    fn emulation_is_refused_and_a_missing_program_is_named() {
        let files = Files::new();
        let mut plan = files.plan(Guest::Halts, PathBuf::from("/nonexistent/firecracker"));
        contract::run(async {
            plan.accel = Accel::Emulation;
            let error = Firecracker.start(&plan, None).await.expect_err("refused");
            assert_eq!(error.kind, VmErrorKind::Unsupported);
            plan.accel = Accel::Kvm;
            plan.memory = Memory::File(plan.directory.with_extension("memory"));
            let error = Firecracker.start(&plan, None).await.expect_err("refused");
            assert_eq!(error.kind, VmErrorKind::ProgramMissing);
            assert_eq!(error.to_string(), "run /nonexistent/firecracker");
            assert!(!plan.directory.exists());
            assert!(!plan.directory.with_extension("memory").exists());
        });
    }
}

/// What is true of QEMU alone.
mod qemu_only {
    use super::qemu::{QemuSubject, pid};
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{PidfdFlags, pidfd_open};
    use smolvm_vmm::qemu::{Qemu, version};
    use smolvm_vmm::{Exit, VmErrorKind, contract};

    /// Set in the process that a test starts to own a machine.
    const OWNER: &str = "SMOLVM_TEST_OWNER";

    /// A program that stands in for QEMU. They are kept as files because a program that a test has
    /// just written can be "busy": a child that another test starts meanwhile has it open, too.
    fn stand_in(name: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "tests/programs", name]
            .iter()
            .collect()
    }

    fn watch(number: u32) -> OwnedFd {
        pidfd_open(pid(number), PidfdFlags::empty()).expect("a running process")
    }

    /// Waits until the process has ended.
    fn expect_end(process: &OwnedFd) {
        let mut watched = [PollFd::new(process, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        let ready = poll(&mut watched, Some(&patience)).expect("poll");
        assert_eq!(ready, 1, "the machine outlives its owner");
    }

    #[test]
    fn the_machine_dies_with_the_thread_that_started_it() {
        let owner = std::thread::spawn(|| {
            let subject = QemuSubject::new();
            let plan = subject.plan(Guest::Ticks);
            let mut process = None;
            contract::run(async {
                let vm = Qemu.start(&plan, None).await.expect("start");
                process = Some((vm.pid(), watch(vm.pid())));
                // So that not the drop kills it.
                std::mem::forget(vm);
            });
            process.expect("a process")
        });
        let (number, process) = owner.join().expect("the owner");
        expect_end(&process);
        let status =
            rustix::process::waitpid(Some(pid(number)), rustix::process::WaitOptions::empty());
        let (_, status) = status.expect("reap").expect("a status");
        assert_eq!(status.terminating_signal(), Some(9));
    }

    #[test]
    fn the_machine_dies_with_the_process_that_started_it() {
        let myself = std::env::current_exe().expect("this program");
        let mut owner = Command::new(myself)
            .args([
                "--exact",
                "--ignored",
                "--nocapture",
                "qemu_only::own_a_machine",
            ])
            .env(OWNER, "yes")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("an owner");
        let output = BufReader::new(owner.stdout.take().expect("its output"));
        let number: u32 = output
            .lines()
            .find_map(|line| line.ok()?.strip_prefix("machine ")?.parse().ok())
            .expect("the process number of its machine");
        let machine = watch(number);
        owner.kill().expect("kill the owner");
        owner.wait().expect("reap the owner");
        expect_end(&machine);
    }

    /// Run in a process of its own by the test above.
    #[test]
    #[ignore = "a helper of another test, which never ends by itself"]
    fn own_a_machine() {
        if std::env::var_os(OWNER).is_none() {
            return;
        }
        let subject = QemuSubject::new();
        let plan = subject.plan(Guest::Ticks);
        contract::run(async {
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            let mut out = std::io::stdout();
            std::io::Write::write_all(&mut out, format!("\nmachine {}\n", vm.pid()).as_bytes())
                .expect("tell");
            let _ = vm.wait().await;
        });
    }

    #[test]
    fn a_missing_program_is_named() {
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        plan.program = PathBuf::from("/nonexistent/qemu");
        contract::run(async {
            let error = Qemu.start(&plan, None).await.expect_err("no program");
            assert_eq!(error.kind, VmErrorKind::ProgramMissing);
            assert_eq!(error.to_string(), "run /nonexistent/qemu");
        });
    }

    #[test]
    fn what_the_vmm_says_last_is_in_its_exit() {
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        // Not a kernel: the initial RAM file system.
        plan.kernel.clone_from(&plan.initrd);
        contract::run(async {
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            let exit = vm.wait().await.expect("wait");
            assert_ne!(exit.code, Some(0), "{exit:?}");
            assert!(exit.stderr.contains("kernel"), "{exit:?}");
            let error = vm.pause().await.expect_err("pause");
            assert_eq!(error.kind, VmErrorKind::Exited);
        });
    }

    #[test]
    fn a_flood_of_words_neither_blocks_nor_grows() {
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        plan.program = stand_in("talker.sh");
        contract::run(async {
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            let Exit { code, stderr, .. } = vm.wait().await.expect("wait");
            assert_eq!(code, Some(3));
            assert!(
                stderr.len() <= 4096 && stderr.len() > 1024,
                "{}",
                stderr.len()
            );
            assert!(stderr.ends_with("the end\n"), "{stderr}");
        });
    }

    #[test]
    fn a_vmm_that_dies_during_a_command_says_why() {
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        plan.program = stand_in("mute.sh");
        contract::run(async {
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            let pause = tokio::time::timeout(Duration::from_secs(20), vm.pause()).await;
            let error = pause.expect("an answer").expect_err("pause");
            assert_eq!(error.kind, VmErrorKind::Exited);
            let cause = std::error::Error::source(&error)
                .expect("a cause")
                .to_string();
            assert!(
                cause.contains("exit code 4, saying: out of luck"),
                "{cause}"
            );
        });
    }

    #[test]
    fn huge_pages_are_for_guests_that_are_not_emulated() {
        let subject = QemuSubject::new();
        let plan = subject.plan(Guest::Halts);
        let expected = match plan.accel {
            Accel::Emulation => "0",
            Accel::Kvm => "1",
        };
        contract::run(async {
            let vm = Qemu.start(&plan, None).await.expect("start");
            let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid()));
            let status = status.expect("a status");
            let said = status
                .lines()
                .find_map(|line| line.strip_prefix("THP_enabled:"));
            assert_eq!(said.map(str::trim), Some(expected), "{status}");
        });
    }

    #[test]
    fn a_vmm_that_dies_while_it_saves_or_restores_leaves_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let [memory, state] = ["memory", "state"].map(|name| directory.path().join(name));
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        plan.program = stand_in("mute.sh");
        plan.memory = Memory::File(memory.clone());
        contract::run(async {
            let told = |error: &smolvm_vmm::VmError| {
                assert_eq!(error.kind, VmErrorKind::Exited);
                let cause = std::error::Error::source(error).expect("a cause");
                assert!(cause.to_string().ends_with("out of luck"), "{cause}");
            };
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            told(&vm.snapshot(&state, None).await.expect_err("snapshot"));
            assert!(!state.exists());

            std::fs::remove_file(&memory).expect("remove");
            plan.program = subject.plan(Guest::Halts).program;
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            vm.snapshot(&state, None).await.expect("snapshot");
            plan.program = stand_in("mute.sh");
            plan.memory = Memory::CopyOf(memory);
            told(
                &Qemu
                    .restore(&plan, &state, None)
                    .await
                    .expect_err("restore"),
            );
        });
    }

    #[test]
    fn a_snapshot_that_is_given_up_leaves_no_state() {
        let directory = tempfile::tempdir().expect("a directory");
        let [memory, state] = ["memory", "state"].map(|name| directory.path().join(name));
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Ticks);
        plan.memory = Memory::File(memory);
        contract::run(async {
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            let given_up = tokio::time::timeout(Duration::ZERO, vm.snapshot(&state, None)).await;
            assert!(given_up.is_err());
            assert!(!state.exists());
        });
    }

    #[test]
    fn memory_is_not_left_behind_when_the_program_is_missing() {
        let directory = tempfile::tempdir().expect("a directory");
        let memory = directory.path().join("memory");
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Halts);
        plan.program = PathBuf::from("/nonexistent/qemu");
        plan.memory = Memory::File(memory.clone());
        contract::run(async {
            Qemu.start(&plan, None).await.expect_err("no program");
            assert!(!memory.exists());
        });
    }

    #[test]
    fn a_network_device_has_a_cable_and_a_cable_a_device() {
        let subject = QemuSubject::new();
        let without = subject.plan(Guest::Resets);
        let with = smolvm_vmm::VmPlan {
            nic: Some(smolvm_vmm::NicPlan { mac: [2; 6] }),
            ..without.clone()
        };
        let cable = std::fs::File::open("/dev/null").expect("a descriptor");
        contract::run(async {
            for (plan, cable) in [
                (with, None),
                (without, Some(Cable::Descriptor(cable.into()))),
            ] {
                let error = Qemu.start(&plan, cable).await.expect_err("one of two");
                assert_eq!(error.kind, VmErrorKind::Unsupported);
            }
        });
    }

    #[test]
    fn disks_are_accepted_up_to_the_limit() {
        let directory = tempfile::tempdir().expect("a directory");
        let subject = QemuSubject::new();
        let mut plan = subject.plan(Guest::Resets);
        let most = Qemu.capabilities().disks_max;
        for index in 0..most {
            let path = directory.path().join(format!("disk,{index}"));
            std::fs::write(&path, [0; 4096]).expect("an image");
            plan.disks.push(smolvm_vmm::DiskPlan {
                path,
                read_only: index % 2 == 0,
            });
        }
        contract::run(async {
            let mut vm = Qemu.start(&plan, None).await.expect("start");
            let exit = vm.wait().await.expect("wait");
            assert_eq!(exit.code, Some(0), "{exit:?}");
        });
        plan.disks.push(plan.disks[0].clone());
        contract::run(async {
            let error = Qemu.start(&plan, None).await.expect_err("one too many");
            assert_eq!(error.kind, VmErrorKind::Unsupported);
        });
    }

    #[test]
    fn the_version_is_told() {
        let subject = QemuSubject::new();
        let version = version(&subject.plan(Guest::Halts).program).expect("a version");
        assert!(version.contains('.'), "{version}");
    }
}

/// How many processes of this one have `name` among their arguments.
fn children_named(name: &str) -> usize {
    let mut count = 0;
    for process in std::fs::read_dir("/proc").expect("the processes") {
        let process = process.expect("a process").path();
        // One that has ended meanwhile has neither.
        let read = |file| std::fs::read_to_string(process.join(file)).unwrap_or_default();
        let own = read("status").contains(&format!("\nPPid:\t{}\n", std::process::id()));
        let named = read("cmdline").contains(&format!("\0{name}\0"));
        count += usize::from(own && named);
    }
    count
}

/// How guests run: translated, unless `SMOLVM_TEST_ACCEL` is `kvm`, as it is in the KVM lab.
fn accel() -> Accel {
    match std::env::var("SMOLVM_TEST_ACCEL").as_deref() {
        Ok("kvm") => Accel::Kvm,
        Ok(other) => panic!("SMOLVM_TEST_ACCEL={other} is no way to run guests"),
        Err(_) => Accel::Emulation,
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
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        VmPlan {
            name: format!("contract-{number}"),
            program,
            directory: self.0.path().join(format!("vmm-{number}")),
            accel: accel(),
            cpus: 1,
            memory_mib: 64,
            memory: Memory::Anonymous,
            kernel: self.0.path().join(Files::kernel_name(guest)),
            devices: Devices::default(),
            initrd: self.0.path().join("initrd"),
            cmdline: String::new(),
            disks: Vec::new(),
            nic: None,
            tsc_khz: Some(1_000_000),
        }
    }
}
