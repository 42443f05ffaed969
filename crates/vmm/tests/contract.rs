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

/// In the jail, which takes root and the control groups of this host.
mod firecracker_jailed {
    use super::firecracker::FirecrackerSubject;
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::sync::Mutex;

    use smolvm_vmm::contract;
    use smolvm_vmm::firecracker::{self, Firecracker};
    use smolvm_vmm::{JailPlan, Limits, VmErrorKind};

    smolvm_vmm::contract_tests!(
        ignore = "needs KVM, Firecracker and its jailer: run by `cargo xtask kvm-lab`",
        JailedSubject::new()
    );

    const PARENT: &str = "smolvm-contract";
    /// More threads than a VMM of one processor has, and few enough to reach.
    const THREADS_MAX: &str = "16";
    const MEMORY_BYTES_MAX: u64 = 256 << 20;

    pub(crate) struct JailedSubject {
        free: FirecrackerSubject,
        jails: Mutex<BTreeSet<String>>,
    }

    impl JailedSubject {
        pub(crate) fn new() -> Self {
            JailedSubject {
                free: FirecrackerSubject::new(),
                jails: Mutex::default(),
            }
        }

        /// The version of control groups with limits, and where they are.
        fn groups() -> (u8, Vec<PathBuf>) {
            let root = Path::new("/sys/fs/cgroup");
            let all = std::fs::read_to_string(root.join("cgroup.controllers"));
            match all.unwrap_or_default().contains("memory") {
                true => (2, vec![root.to_owned()]),
                false => (
                    1,
                    ["cpu", "memory", "pids"]
                        .map(|name| root.join(name))
                        .to_vec(),
                ),
            }
        }

        fn limits() -> Limits {
            let (version, _) = Self::groups();
            let values: &[(&str, &str)] = match version {
                2 => &[
                    ("cpu.max", "200000 100000"),
                    ("memory.max", "268435456"),
                    ("pids.max", THREADS_MAX),
                ],
                _ => &[
                    ("cpu.cfs_quota_us", "200000"),
                    ("memory.limit_in_bytes", "268435456"),
                    ("pids.max", THREADS_MAX),
                ],
            };
            let text = |&(file, value): &(&str, &str)| (file.to_owned(), value.to_owned());
            Limits {
                version,
                parent: PARENT.to_owned(),
                values: values.iter().map(text).collect(),
            }
        }

        /// What a file of the jail's control group says.
        fn group_file(id: &str, names: [&str; 2]) -> String {
            let (version, roots) = Self::groups();
            let name = names[usize::from(version) - 1];
            let paths = roots
                .iter()
                .map(|root| root.join(PARENT).join(id).join(name));
            let read = paths
                .into_iter()
                .find_map(|path| std::fs::read_to_string(path).ok());
            read.unwrap_or_else(|| panic!("{name} of {id}"))
                .trim()
                .to_owned()
        }
    }

    impl Drop for JailedSubject {
        fn drop(&mut self) {
            let jails = self
                .jails
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for root in Self::groups().1 {
                for jail in jails.iter() {
                    let _ = std::fs::remove_dir(root.join(PARENT).join(jail));
                }
            }
        }
    }

    impl Subject for JailedSubject {
        fn backend(&self) -> &dyn Backend {
            &Firecracker
        }

        fn plan(&self, guest: Guest) -> VmPlan {
            static USERS: AtomicU32 = AtomicU32::new(2_100_000);
            let mut plan = self.free.plan(guest);
            let directory = plan.program.parent().expect("a directory");
            // Test programs of one run have different ones, though all count from the same.
            plan.name = format!("{}-{}", plan.name, std::process::id());
            self.jails.lock().expect("jails").insert(plan.name.clone());
            plan.jail = Some(JailPlan {
                program: directory.join(firecracker::JAILER),
                id: plan.name.clone(),
                user: USERS.fetch_add(1, Ordering::Relaxed),
                limits: Some(Self::limits()),
            });
            plan
        }

        fn exists(&self, number: u32) -> bool {
            self.free.exists(number)
        }

        fn repeats(&self) -> bool {
            true
        }

        fn count(&self, name: &str) -> usize {
            children_named(name)
        }

        fn kill_from_outside(&self, number: u32) {
            self.free.kill_from_outside(number);
        }
    }

    /// Waits until the guest speaks: everything is behind it that is done before. Its console is to be kept.
    async fn speaks(vm: &mut dyn smolvm_vmm::Vm) -> std::os::unix::net::UnixStream {
        let console = vm.take_console().expect("a console");
        let heard = tokio::task::spawn_blocking(move || {
            std::io::Read::read_exact(&mut &console, &mut [0; 4]).expect("a tick");
            console
        });
        heard.await.expect("the guest speaks")
    }

    fn status(pid: u32, word: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
        let line = text.lines().find_map(|line| line.strip_prefix(word));
        let words: Vec<_> = line.expect(word).split_whitespace().collect();
        words.join(" ")
    }

    fn namespace(pid: impl std::fmt::Display, kind: &str) -> PathBuf {
        std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace")
    }

    /// Set in the process that a test starts to own a machine.
    const OWNER: &str = "SMOLVM_TEST_JAILED_OWNER";

    /// Though its VMM changes its user, by which it loses the request to be killed with its parent.
    #[test]
    #[ignore = "needs KVM, Firecracker and its jailer: run by `cargo xtask kvm-lab`"]
    fn a_machine_in_a_jail_dies_with_its_owner() {
        use std::io::BufRead;
        let mut owner = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "--ignored", "--nocapture"])
            .arg("firecracker_jailed::own_a_machine")
            .env(OWNER, "yes")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("an owner");
        let output = std::io::BufReader::new(owner.stdout.take().expect("its output"));
        let number: u32 = output
            .lines()
            .find_map(|line| line.ok()?.strip_prefix("machine ")?.parse().ok())
            .expect("the process number of its machine");
        let machine = super::qemu_only::watch(number);
        owner.kill().expect("kill the owner");
        owner.wait().expect("reap the owner");
        super::qemu_only::expect_end(&machine);
        // What its owner would have removed.
        for root in JailedSubject::groups().1 {
            let id = format!("contract-0-{}", owner.id());
            std::fs::remove_dir(root.join(PARENT).join(id)).expect("its control group");
        }
    }

    /// Run in a process of its own by the test above.
    #[test]
    #[ignore = "a helper of another test, which never ends by itself"]
    fn own_a_machine() {
        if std::env::var_os(OWNER).is_none() {
            return;
        }
        let subject = JailedSubject::new();
        let plan = subject.plan(Guest::Ticks);
        contract::run(async {
            let mut vm = Firecracker.start(&plan, None).await.expect("start");
            let _console = speaks(vm.as_mut()).await;
            let mut out = std::io::stdout();
            std::io::Write::write_all(&mut out, format!("\nmachine {}\n", vm.pid()).as_bytes())
                .expect("tell");
            let _ = vm.wait().await;
        });
    }

    /// Every layer, asked of the kernel while a machine runs.
    #[test]
    #[ignore = "needs KVM, Firecracker and its jailer: run by `cargo xtask kvm-lab`"]
    fn a_jail_has_every_wall() {
        let subject = JailedSubject::new();
        let plan = subject.plan(Guest::Ticks);
        let jail = plan.jail.clone().expect("a jail");
        contract::run(async {
            let mut vm = Firecracker.start(&plan, None).await.expect("start");
            let _console = speaks(vm.as_mut()).await;
            let pid = vm.pid();

            // A user and a group of its own, no other groups, and no rights.
            let four = [jail.user; 4].map(|user| user.to_string()).join(" ");
            assert_eq!(status(pid, "Uid:"), four);
            assert_eq!(status(pid, "Gid:"), four);
            assert_eq!(status(pid, "Groups:"), "");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(status(pid, set), "0000000000000000", "{set}");
            }
            assert_eq!(status(pid, "NoNewPrivs:"), "1");
            // System calls are filtered in every thread that the guest's doing reaches. (A build for glibc
            // has filters that let everything pass.)
            for thread in std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads") {
                let thread = thread.expect("a thread").path();
                let text = std::fs::read_to_string(thread.join("status")).expect("a status");
                assert!(text.contains("\nSeccomp:\t2\n"), "{text}");
            }

            // Nothing of the host's is in its namespaces.
            for kind in ["mnt", "ipc", "uts", "net"] {
                assert_ne!(namespace(pid, kind), namespace("self", kind), "{kind}");
            }

            // What it finds below its root directory, and nothing above.
            let root = format!("/proc/{pid}/root");
            let mut found: Vec<_> = std::fs::read_dir(&root)
                .expect("a root directory")
                .map(|entry| {
                    entry
                        .expect("an entry")
                        .file_name()
                        .into_string()
                        .expect("UTF-8")
                })
                .filter(|name| !["lib", "lib64", "usr"].contains(&name.as_str()))
                .collect();
            found.sort();
            let expected = [
                "api.sock",
                "config",
                "dev",
                "firecracker",
                "firecracker.pid",
                "initrd",
                "kernel",
                "log",
                "run",
                "vsock",
                "vsock_1024",
            ];
            assert_eq!(found, expected);
            for outside in ["etc", "proc", "sys", "root", "home", "../etc"] {
                let there = std::fs::metadata(format!("{root}/{outside}"));
                assert!(there.is_err(), "{outside}");
            }
            let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mounts");
            let kernel = mounts.lines().find(|line| line.contains(" /kernel "));
            let options = kernel.expect("the kernel").split(' ').nth(5);
            assert_eq!(
                options.map(|all| all.starts_with("ro")),
                Some(true),
                "{mounts}"
            );

            // Its limits.
            let memory =
                JailedSubject::group_file(&jail.id, ["memory.limit_in_bytes", "memory.max"]);
            assert_eq!(memory, MEMORY_BYTES_MAX.to_string());
            let threads = JailedSubject::group_file(&jail.id, ["pids.max", "pids.max"]);
            assert_eq!(threads, THREADS_MAX);
            let cpu = JailedSubject::group_file(&jail.id, ["cpu.cfs_quota_us", "cpu.max"]);
            assert!(cpu.starts_with("200000"), "{cpu}");
            let within = JailedSubject::group_file(&jail.id, ["cgroup.procs", "cgroup.procs"]);
            // The kernel's own thread for the machine is there, too.
            assert!(
                within.lines().any(|line| line == pid.to_string()),
                "{within}"
            );
            let files = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
            let files = files
                .lines()
                .find(|line| line.starts_with("Max open files"));
            assert!(
                files.is_some_and(|line| line.contains(" 1024 ")),
                "{files:?}"
            );

            vm.kill().await.expect("kill");
            drop(vm);
            assert!(!plan.directory.exists());
        });
    }

    /// Files of others, and of the host, are closed to a process that is where the VMM is.
    #[test]
    #[ignore = "needs KVM, Firecracker and its jailer: run by `cargo xtask kvm-lab`"]
    fn a_jail_keeps_who_is_in_it_from_everybody_else() {
        use std::os::unix::process::CommandExt;
        let subject = JailedSubject::new();
        let [mut one, mut other] = [(); 2].map(|()| subject.plan(Guest::Ticks));
        let directory = tempfile::tempdir().expect("a directory");
        for (plan, name) in [(&mut one, "one"), (&mut other, "other")] {
            let path = directory.path().join(name);
            std::fs::write(&path, [0; 4096]).expect("a disk");
            plan.disks.push(smolvm_vmm::DiskPlan {
                path,
                read_only: false,
            });
        }
        contract::run(async {
            let _one = Firecracker.start(&one, None).await.expect("start");
            let _other = Firecracker.start(&other, None).await.expect("start");
            // The user of the first, even outside its root directory, and where it may look around.
            let user = one.jail.as_ref().expect("a jail").user;
            std::fs::set_permissions(
                directory.path(),
                std::os::unix::fs::PermissionsExt::from_mode(0o755),
            )
            .expect("a mode");
            let reads = |path: &Path| {
                let mut cat = std::process::Command::new("cat");
                cat.arg(path).uid(user).gid(user);
                cat.stdout(std::process::Stdio::null())
                    .stderr(std::process::Stdio::null());
                cat.status().expect("cat").success()
            };
            let disk = |plan: &VmPlan| plan.disks[0].path.clone();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(disk(&one), std::fs::Permissions::clone(&mode))
                .expect("a mode");
            std::fs::set_permissions(disk(&other), mode).expect("a mode");
            assert!(reads(&disk(&one)), "its own disk");
            assert!(!reads(&disk(&other)), "the other's disk");
            assert!(
                !reads(&other.directory.join("firecracker")),
                "the other's jail"
            );
            assert!(!reads(Path::new("/etc/shadow")), "the host's secrets");
        });
    }

    /// A control group that is full has no room for a process or thread more.
    #[test]
    #[ignore = "needs KVM, Firecracker and its jailer: run by `cargo xtask kvm-lab`"]
    fn a_jail_refuses_processes_over_its_limit() {
        let subject = JailedSubject::new();
        let plan = subject.plan(Guest::Ticks);
        let id = plan.jail.as_ref().expect("a jail").id.clone();
        contract::run(async {
            let mut vm = Firecracker.start(&plan, None).await.expect("start");
            let _console = speaks(vm.as_mut()).await;
            let (_, roots) = JailedSubject::groups();
            let group = roots.last().expect("a root").join(PARENT).join(&id);
            // A shell enters the group and starts more than it may.
            let script = format!(
                "echo $$ >{}/cgroup.procs && for i in $(seq 32); do sleep 2 <&- >&- 2>&- & done",
                group.display()
            );
            let output = std::process::Command::new("sh")
                .args(["-c", &script])
                .output();
            let output = output.expect("sh");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.to_lowercase().contains("fork"), "{output:?}");
        });
    }

    #[test]
    #[ignore = "needs KVM, Firecracker and its jailer: run by `cargo xtask kvm-lab`"]
    fn a_jailer_that_is_not_there_is_named_and_one_that_fails_says_why() {
        let subject = JailedSubject::new();
        let plan = subject.plan(Guest::Halts);
        let with = |change: fn(&mut JailPlan)| {
            let mut plan = plan.clone();
            change(plan.jail.as_mut().expect("a jail"));
            plan
        };
        contract::run(async {
            let plan = with(|jail| jail.program = "/nonexistent/jailer".into());
            let error = Firecracker.start(&plan, None).await.expect_err("no jailer");
            assert_eq!(error.kind, VmErrorKind::ProgramMissing);
            assert_eq!(error.to_string(), "run /nonexistent/jailer");
            assert!(!plan.directory.exists());
            let plan = with(|jail| jail.id = "no id".into());
            let mut vm = Firecracker.start(&plan, None).await.expect("start");
            let exit = vm.wait().await.expect("wait");
            assert_ne!(exit.code, Some(0));
            assert!(exit.stderr.contains("Invalid"), "{exit:?}");
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

    pub(crate) fn watch(number: u32) -> OwnedFd {
        pidfd_open(pid(number), PidfdFlags::empty()).expect("a running process")
    }

    /// Waits until the process has ended.
    pub(crate) fn expect_end(process: &OwnedFd) {
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
            jail: None,
        }
    }
}
