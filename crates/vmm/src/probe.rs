//! Whether the host's hypervisor works, by trying it.
//!
//! That `/dev/kvm` opens proves nothing. There are hosts where it opens and makes machines which
//! then cannot run a stock kernel. So a few instructions of ordinary 64-bit code are run, those that
//! kernels use, and their result is looked at.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit};
use serde::{Deserialize, Serialize};

use crate::sys::{self, Machine};

/// How long the guest code may take. It takes some 4 ms, making and destroying the machine included.
pub const DEADLINE: Duration = Duration::from_millis(500);

/// How long an interrupted guest may take to be gone. Destroying the machine is part of that, and a
/// busy host takes its time over it.
const STOPPING: Duration = Duration::from_secs(2);

/// Whether machines can be run by the host's hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Verdict {
    /// It ran the code that kernels are made of.
    Works,
    /// There is none, or it is not for this user.
    Absent {
        /// Why, and what to do about it.
        why: String,
    },
    /// There is one, but it cannot run a kernel.
    Broken {
        /// What was tried and how it failed.
        why: String,
    },
}

/// Tries the host's hypervisor, KVM.
///
/// Blocks the thread for a few milliseconds, and never for more than 6 s. Nothing
/// remains of the try. (If the kernel does not even let the try be interrupted, its thread remains
/// for as long as that lasts; this has not been seen.) The verdict holds until the host's next boot
/// or change of modules, or, if absent, of permissions.
#[must_use]
pub fn kvm() -> Verdict {
    probe(Path::new("/dev/kvm"), DEADLINE)
}

/// How much longer the second try may take.
const RETRY_FACTOR: u32 = 4;

fn probe(device: &Path, deadline: Duration) -> Verdict {
    let surroundings = Surroundings {
        software_only: Path::new("/sys/module/kvm_pvm").exists(),
    };
    match std::fs::File::options().read(true).write(true).open(device) {
        Ok(_) => {
            let mut outcome = run_with_deadline(None, deadline);
            if matches!(outcome, Outcome::TooLong { .. }) {
                // The first machine after the module was loaded may take long on a host that is
                // busy or itself emulated, and the verdict is remembered until the next boot.
                outcome = run_with_deadline(None, RETRY_FACTOR * deadline);
            }
            verdict(&outcome, surroundings)
        }
        Err(error) => absent(device, &error),
    }
}

/// What is known of the host besides.
#[derive(Debug, Clone, Copy)]
struct Surroundings {
    /// KVM without the processor's help, for hosts that are themselves virtual machines.
    software_only: bool,
}

/// How the try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// The guest wrote this byte to the port.
    Wrote(u8),
    /// KVM gave up.
    InternalError {
        at: &'static str,
        suberror: u32,
        data: Vec<u64>,
    },
    /// The processor refused to enter the guest, for this reason.
    FailEntry { reason: u64 },
    /// The guest ended otherwise than by its last instruction.
    Exit { at: &'static str, exit: String },
    /// It did not come to an end.
    TooLong { at: &'static str },
    /// It did not even let itself be interrupted.
    Stuck,
    /// A machine could not be made.
    Refused { what: &'static str, error: String },
}

/// The byte that cmpxchg16b stores, and that the guest then reads back and reports.
const REPORT: u8 = 0x5a;

fn verdict(outcome: &Outcome, surroundings: Surroundings) -> Verdict {
    if *outcome == Outcome::Wrote(REPORT) {
        return Verdict::Works;
    }
    let mut why = format!("/dev/kvm opens, but {outcome}");
    if surroundings.software_only {
        why.push_str(
            "; the module kvm_pvm is loaded, which virtualizes without the processor's help and \
             runs only kernels made for it",
        );
    }
    Verdict::Broken { why }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Wrote(byte) => write!(
                f,
                "guest code computed wrongly (it reported {byte:#04x} instead of {REPORT:#04x})"
            ),
            Outcome::InternalError { at, suberror, data } => write!(
                f,
                "guest code ended with KVM_EXIT_INTERNAL_ERROR at {at} (suberror {suberror}, data \
                 {data:x?})"
            ),
            Outcome::FailEntry { reason } => {
                write!(
                    f,
                    "the processor refused to enter the guest (reason {reason:#x})"
                )
            }
            Outcome::Exit { at, exit } => write!(f, "guest code ended with {exit} at {at}"),
            Outcome::TooLong { at } => {
                write!(
                    f,
                    "guest code of a few microseconds did not finish; it was at {at}"
                )
            }
            Outcome::Stuck => write!(f, "guest code did not finish and could not be interrupted"),
            Outcome::Refused { what, error } => write!(f, "the kernel refuses to {what}: {error}"),
        }
    }
}

fn absent(device: &Path, error: &io::Error) -> Verdict {
    let device = device.display();
    let why = match error.kind() {
        io::ErrorKind::NotFound => format!(
            "{device} does not exist: load the module kvm_intel or kvm_amd; if that fails, \
             virtualization is switched off in the firmware, or this host is a virtual machine \
             without nested virtualization"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "{device} is not for this user: add the user to the group that owns it, usually with \
             `sudo usermod -aG kvm $USER`, and log in again"
        ),
        _ => format!("{device} cannot be opened: {error}"),
    };
    Verdict::Absent { why }
}

/// Runs the guest code (or other code, for the tests) on a thread of its own.
fn run_with_deadline(code: Option<&'static [u8]>, deadline: Duration) -> Outcome {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name("kvm-probe".to_owned());
    let spawned = thread.spawn(move || {
        let outcome = match Guest::new(code) {
            Ok(mut guest) => {
                let kickable = sys::be_kickable(&guest.machine.vcpu);
                let _ = tell.send(Told::Kickable);
                match kickable {
                    Ok(()) => guest.run(),
                    Err(error) => refused("set a signal mask")(error),
                }
            }
            Err(outcome) => outcome,
        };
        let _ = tell.send(Told::Over(outcome));
    });
    match spawned {
        Ok(thread) => await_outcome(thread, &told, deadline),
        Err(error) => refused("start a thread")(error),
    }
}

/// What the thread has to say.
enum Told {
    /// From now on it can be interrupted.
    Kickable,
    /// It is about to end.
    Over(Outcome),
}

fn await_outcome(
    thread: JoinHandle<()>,
    told: &mpsc::Receiver<Told>,
    deadline: Duration,
) -> Outcome {
    let mut kickable = false;
    for last in [false, true] {
        // A try has one deadline for making the machine and one for running it, or for stopping.
        match told.recv_timeout(deadline) {
            Ok(Told::Kickable) => kickable = true,
            Ok(Told::Over(outcome)) => return joined(thread, outcome),
            Err(_) if kickable || last => break,
            Err(_) => {}
        }
    }
    if kickable {
        sys::kick(&thread);
        if let Ok(Told::Over(outcome)) = told.recv_timeout(STOPPING) {
            return joined(thread, outcome);
        }
    }
    Outcome::Stuck
}

fn joined(thread: JoinHandle<()>, outcome: Outcome) -> Outcome {
    // It has said its last word; only the machine's memory is left to be freed.
    let _ = thread.join();
    outcome
}

/// A machine about to run the code.
struct Guest {
    machine: Machine,
    steps: Vec<Step>,
}

/// A piece of the code, by the address where it begins.
#[derive(Debug, Clone, Copy)]
struct Step {
    begins: u64,
    name: &'static str,
}

/// Guest-physical addresses. One page each, but for the stack, which grows down.
const GDT: usize = 0x1000;
const PML4: usize = 0x2000;
const PDPT: usize = 0x3000;
const PD: usize = 0x4000;
const CODE: usize = 0x5000;
const OPERAND: usize = 0x6000;
const XSAVE_AREA: usize = 0x7000;
const STACK_TOP: u64 = 0x9000;
const PAGES: usize = 9;

/// An I/O port where nothing is.
const PORT: u16 = 0x0500;

impl Guest {
    fn new(code: Option<&'static [u8]>) -> Result<Guest, Outcome> {
        let kvm = Kvm::new().map_err(refused("open the device"))?;
        let vm = kvm.create_vm().map_err(refused("make a machine"))?;
        // Where Intel processors without "unrestricted guest" keep three pages: api.rst,
        // KVM_SET_TSS_ADDR. Others ignore it.
        vm.set_tss_address(0xfffb_d000)
            .map_err(refused("place the task state segment"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("list the processor's features"))?;
        let (program, steps) = match code {
            Some(code) => (code.to_vec(), Vec::new()),
            None => program(features(&cpuid)),
        };
        // Identity mapping of the first 2 MiB: present, writable; in the last level also "large".
        let entry = |address: usize| (address as u64 | 0b11).to_le_bytes();
        let contents: [(usize, &[u8]); 5] = [
            (GDT, &gdt()),
            (PML4, &entry(PDPT)),
            (PDPT, &entry(PD)),
            (PD, &0b1000_0011_u64.to_le_bytes()),
            (CODE, &program),
        ];
        let machine = Machine::new(vm, PAGES, &contents).map_err(refused("make a virtual CPU"))?;
        let guest = Guest { machine, steps };
        guest.set_registers(&cpuid)?;
        Ok(guest)
    }

    /// 64-bit mode with the features that kernels switch on.
    fn set_registers(&self, cpuid: &CpuId) -> Result<(), Outcome> {
        const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
        const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
        const CR4_OSXSAVE: u64 = 1 << 18;
        const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

        let vcpu = &self.machine.vcpu;
        vcpu.set_cpuid2(cpuid)
            .map_err(refused("set the processor's features"))?;
        let mut sregs = vcpu.get_sregs().map_err(refused("read registers"))?;
        sregs.cr0 = CR0_PE_MP_ET_NE_WP_PG;
        sregs.cr3 = PML4 as u64;
        sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
        if features(cpuid).xsave {
            sregs.cr4 |= CR4_OSXSAVE;
        }
        sregs.efer = EFER_LME_LMA;
        sregs.gdt.base = GDT as u64;
        sregs.gdt.limit = 3 * 8 - 1;
        sregs.cs = segment(1, 0b1011);
        let data = segment(2, 0b0011);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        vcpu.set_sregs(&sregs)
            .map_err(refused("set control registers"))?;
        vcpu.set_regs(&kvm_regs {
            rip: CODE as u64,
            rsp: STACK_TOP,
            rflags: 0b10,
            ..kvm_regs::default()
        })
        .map_err(refused("set registers"))
    }

    fn run(&mut self) -> Outcome {
        let exit = match self.machine.vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, &[byte])) => return Outcome::Wrote(byte),
            Ok(VcpuExit::FailEntry(reason, _)) => return Outcome::FailEntry { reason },
            Ok(VcpuExit::InternalError) => None,
            Ok(other) => Some(format!("{other:?}")),
            Err(error) if error.errno() == libc::EINTR => {
                return Outcome::TooLong { at: self.at() };
            }
            Err(error) => Some(format!("the error {error}")),
        };
        match exit {
            Some(exit) => Outcome::Exit {
                at: self.at(),
                exit,
            },
            None => {
                let (suberror, data) = self.machine.internal_error();
                Outcome::InternalError {
                    at: self.at(),
                    suberror,
                    data,
                }
            }
        }
    }

    /// The piece of code that the guest is in.
    fn at(&self) -> &'static str {
        let rip = self.machine.vcpu.get_regs().map_or(0, |regs| regs.rip);
        let step = self.steps.iter().rev().find(|step| step.begins <= rip);
        step.map_or("an unknown place", |step| step.name)
    }
}

/// The features on which the code depends.
#[derive(Debug, Clone, Copy)]
struct Features {
    cmpxchg16b: bool,
    xsave: bool,
}

/// CPUID leaf 1, ecx: bit 13 is CMPXCHG16B, bit 26 is XSAVE.
fn features(cpuid: &CpuId) -> Features {
    let leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 1);
    let ecx = leaf.map_or(0, |leaf| leaf.ecx);
    Features {
        cmpxchg16b: ecx & 1 << 13 != 0,
        xsave: ecx & 1 << 26 != 0,
    }
}

/// The guest code and its pieces.
fn program(features: Features) -> (Vec<u8>, Vec<Step>) {
    let [operand_low, operand_high] = [OPERAND.to_le_bytes()[0], OPERAND.to_le_bytes()[1]];
    let [area_low, area_high] = [XSAVE_AREA.to_le_bytes()[0], XSAVE_AREA.to_le_bytes()[1]];
    let [port_low, port_high] = PORT.to_le_bytes();

    #[rustfmt::skip]
    let count: &[u8] = &[
        0xb9, 0x10, 0x27, 0, 0, //                    mov ecx, 10000
        0xff, 0xc9, //                             1: dec ecx
        0x75, 0xfc, //                                jnz 1b
    ];
    #[rustfmt::skip]
    let cmpxchg16b: &[u8] = &[
        0xbf, operand_low, operand_high, 0, 0, //     mov edi, OPERAND
        0x31, 0xc0, 0x31, 0xd2, //                    xor eax, eax; xor edx, edx
        0xbb, REPORT, 0, 0, 0, //                     mov ebx, REPORT
        0x31, 0xc9, //                                xor ecx, ecx
        0xf0, 0x48, 0x0f, 0xc7, 0x0f, //              lock cmpxchg16b [rdi]
    ];
    #[rustfmt::skip]
    let store: &[u8] = &[
        0xbf, operand_low, operand_high, 0, 0, //     mov edi, OPERAND
        0xc6, 0x07, REPORT, //                        mov byte [rdi], REPORT
    ];
    #[rustfmt::skip]
    let xsave: &[u8] = &[
        0x31, 0xc9, 0x31, 0xd2, //                    xor ecx, ecx; xor edx, edx
        0xb8, 3, 0, 0, 0, //                          mov eax, 3            x87 and SSE
        0x0f, 0x01, 0xd1, //                          xsetbv
        0xbf, area_low, area_high, 0, 0, //           mov edi, XSAVE_AREA
        0x48, 0x0f, 0xae, 0x27, //                    xsave64 [rdi]
        0x48, 0x0f, 0xae, 0x2f, //                    xrstor64 [rdi]
    ];
    #[rustfmt::skip]
    let report: &[u8] = &[
        0x8a, 0x04, 0x25, operand_low, operand_high, 0, 0, // mov al, [OPERAND]
        0x66, 0xba, port_low, port_high, //                   mov dx, PORT
        0xee, //                                              out dx, al
        0xf4, //                                              hlt
    ];

    let pieces: [(bool, &'static str, &[u8]); 5] = [
        (true, "a loop", count),
        (features.cmpxchg16b, "`lock cmpxchg16b`", cmpxchg16b),
        (!features.cmpxchg16b, "a store", store),
        (features.xsave, "`xsave`", xsave),
        (true, "`out`", report),
    ];
    let mut code = Vec::new();
    let mut steps = Vec::new();
    for (wanted, name, bytes) in pieces {
        if wanted {
            steps.push(Step {
                begins: (CODE + code.len()) as u64,
                name,
            });
            code.extend_from_slice(bytes);
        }
    }
    (code, steps)
}

/// Descriptors: none, flat 64-bit code, flat data.
fn gdt() -> [u8; 24] {
    let mut table = [0; 24];
    table[8..16].copy_from_slice(&0x00af_9b00_0000_ffff_u64.to_le_bytes());
    table[16..].copy_from_slice(&0x00cf_9300_0000_ffff_u64.to_le_bytes());
    table
}

/// The segment of the descriptor with this number.
fn segment(number: u16, kind: u8) -> kvm_segment {
    let code = kind & 0b1000 != 0;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: number * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..kvm_segment::default()
    }
}

/// Names what the kernel did not let us do.
fn refused<E: fmt::Display>(what: &'static str) -> impl Fn(E) -> Outcome {
    move |error| Outcome::Refused {
        what,
        error: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Instant;

    const HARDWARE: Surroundings = Surroundings {
        software_only: false,
    };
    const SOFTWARE: Surroundings = Surroundings {
        software_only: true,
    };

    /// Held by the tests that have a probe thread or count them.
    static TURNS: Mutex<()> = Mutex::new(());

    fn why(outcome: &Outcome, surroundings: Surroundings) -> String {
        match verdict(outcome, surroundings) {
            Verdict::Broken { why } => why,
            other => panic!("{outcome:?} gives {other:?}"),
        }
    }

    #[test]
    fn only_the_right_answer_works() {
        assert_eq!(verdict(&Outcome::Wrote(REPORT), HARDWARE), Verdict::Works);
        // A software hypervisor that can do it is as good as another.
        assert_eq!(verdict(&Outcome::Wrote(REPORT), SOFTWARE), Verdict::Works);
        assert_eq!(
            why(&Outcome::Wrote(0), HARDWARE),
            "/dev/kvm opens, but guest code computed wrongly (it reported 0x00 instead of 0x5a)"
        );
    }

    #[test]
    fn a_failure_is_told_in_words() {
        let internal = Outcome::InternalError {
            at: "`lock cmpxchg16b`",
            suberror: 1,
            data: vec![],
        };
        assert_eq!(
            why(&internal, SOFTWARE),
            "/dev/kvm opens, but guest code ended with KVM_EXIT_INTERNAL_ERROR at \
             `lock cmpxchg16b` (suberror 1, data []); the module kvm_pvm is loaded, which \
             virtualizes without the processor's help and runs only kernels made for it"
        );
        for (outcome, words) in [
            (
                Outcome::FailEntry {
                    reason: 0x8000_0021,
                },
                "refused to enter the guest (reason 0x80000021)",
            ),
            (
                Outcome::Exit {
                    at: "`xsave`",
                    exit: "Shutdown".into(),
                },
                "ended with Shutdown at `xsave`",
            ),
            (
                Outcome::TooLong { at: "a loop" },
                "did not finish; it was at a loop",
            ),
            (Outcome::Stuck, "could not be interrupted"),
            (
                Outcome::Refused {
                    what: "make a machine",
                    error: "busy".into(),
                },
                "the kernel refuses to make a machine: busy",
            ),
        ] {
            let why = why(&outcome, HARDWARE);
            assert!(why.contains(words), "{why}");
            assert!(!why.contains("kvm_pvm"), "{why}");
        }
    }

    #[test]
    fn absence_says_what_to_do() {
        let missing = probe(Path::new("/nonexistent/kvm"), DEADLINE);
        let Verdict::Absent { why } = missing else {
            panic!("{missing:?}");
        };
        assert!(
            why.starts_with("/nonexistent/kvm does not exist: load"),
            "{why}"
        );

        let denied = io::Error::from_raw_os_error(libc::EACCES);
        let Verdict::Absent { why } = absent(Path::new("/dev/kvm"), &denied) else {
            panic!();
        };
        assert!(why.contains("usermod -aG kvm"), "{why}");
    }

    #[test]
    fn the_verdict_comes_in_time_and_nothing_remains() {
        let _turn = TURNS.lock();
        let begun = Instant::now();
        let verdict = kvm();
        assert!(
            begun.elapsed() < 2 * DEADLINE + STOPPING,
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(probe_threads(), 0);
        if Path::new("/sys/module/kvm_pvm").exists() {
            let Verdict::Broken { why } = &verdict else {
                panic!("{verdict:?}");
            };
            assert!(why.contains("kvm_pvm"), "{why}");
        }
    }

    #[test]
    fn an_endless_guest_is_interrupted() {
        const JUMP_TO_SELF: &[u8] = &[0xeb, 0xfe];
        let _turn = TURNS.lock();
        let deadline = Duration::from_millis(100);
        let begun = Instant::now();
        let outcome = run_with_deadline(Some(JUMP_TO_SELF), deadline);
        assert!(
            begun.elapsed() < 2 * deadline + STOPPING,
            "{:?}",
            begun.elapsed()
        );
        if Kvm::new().is_ok() {
            let at = "an unknown place";
            assert_eq!(outcome, Outcome::TooLong { at });
        } else {
            assert!(matches!(outcome, Outcome::Refused { .. }), "{outcome:?}");
        }
    }

    #[test]
    fn the_code_is_what_was_meant() {
        let all = Features {
            cmpxchg16b: true,
            xsave: true,
        };
        let (code, steps) = program(all);
        let names: Vec<_> = steps.iter().map(|step| step.name).collect();
        assert_eq!(names, ["a loop", "`lock cmpxchg16b`", "`xsave`", "`out`"]);
        assert!(code.windows(5).any(|w| w == [0xf0, 0x48, 0x0f, 0xc7, 0x0f]));
        assert_eq!(code.last(), Some(&0xf4));

        let none = Features {
            cmpxchg16b: false,
            xsave: false,
        };
        let names: Vec<_> = program(none).1.iter().map(|step| step.name).collect();
        assert_eq!(names, ["a loop", "a store", "`out`"]);
    }

    /// Threads of this process that run a probe now.
    fn probe_threads() -> usize {
        let tasks = std::fs::read_dir("/proc/self/task").expect("a list of threads");
        tasks
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.trim() == "kvm-probe")
            .count()
    }
}
