//! Output of any size arrives whole, in bounded memory, and does not stand in anybody's way.

use std::io::{Read as _, Write as _};
use std::time::Instant;

use smolvm_testkit::Home;

const MIB: usize = 1024 * 1024;

/// Writes 1024 blocks of 1 MiB, each its number in eight bytes and a pattern. One loop in native
/// code does the writing, so the guest's processor is not what is measured.
const GENERATOR: &str = "
import sys
rest = (bytes(range(251)) * 4178)[:1048568]
for number in range(1024):
    sys.stdout.buffer.write(number.to_bytes(8, 'big') + rest)
sys.stdout.buffer.flush()
sys.stdin.read()
";

/// Peak resident memory in KiB, by a line of /proc/pid/status.
fn peak_kib(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("no VmHWM in {status}"))
}

#[test]
fn a_gibibyte_arrives_whole_and_nobody_holds_much_of_it() {
    let home = Home::new(1);
    home.create("box", &[]);
    let keeper = home.info("box").keeper();
    let (mut exec, mut stdout) = home
        .smolvm(["exec", "box", "--", "python3", "-c", GENERATOR])
        .open_stdin()
        .spawn_unread();

    let mut wanted: Vec<u8> = [0; 8]
        .into_iter()
        .chain((0..=250).cycle())
        .take(MIB)
        .collect();
    let mut block = vec![0; MIB];
    let mut begun = None;
    for number in 0..1024_u64 {
        wanted[..8].copy_from_slice(&number.to_be_bytes());
        stdout
            .read_exact(&mut block)
            .unwrap_or_else(|error| panic!("the stream ended in block {number} of 1024: {error}"));
        begun.get_or_insert_with(Instant::now);
        assert!(block == wanted, "block {number} is not as it was written");
    }
    let seconds = begun.expect("blocks").elapsed().as_secs_f64();

    // All of them live: the command waits for the end of its input.
    let peak = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        peak_kib(&status.expect("a running process"))
    };
    let peaks = [
        ("smolvm", peak(exec.pid())),
        ("smolvm-keeper", peak(keeper.pid())),
        (
            "smolvm-agent",
            peak_kib(&home.sh("box", "cat /proc/1/status")),
        ),
    ];
    let _ = writeln!(
        std::io::stderr(),
        "1 GiB of output: {:.0} MiB/s; peaks in KiB: {peaks:?}",
        1023.0 / seconds
    );
    for (who, kib) in peaks {
        assert!(kib < 64 * 1024, "{who} held {kib} KiB");
    }
    exec.close_stdin();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).expect("a pipe");
    assert_eq!(rest.len(), 0, "more came than was written");
    exec.wait().ok();
    home.rm(&["box"]);
}

#[test]
fn input_of_any_size_arrives_whole() {
    let home = Home::new(1);
    home.create("box", &[]);
    let mut exec = home
        .smolvm(["exec", "box", "--", "sh", "-c", "tee /dev/stderr | wc -c"])
        .open_stdin()
        .spawn();
    let block: Vec<u8> = (0..=250).cycle().take(MIB).collect();
    for _ in 0..64 {
        exec.write(&block);
    }
    exec.close_stdin();
    let finished = exec.wait();
    assert_eq!(finished.code, Some(0));
    assert_eq!(finished.out().trim(), (64 * MIB).to_string());
    assert!(
        finished.stderr.chunks(MIB).all(|chunk| chunk == block),
        "the input came back changed"
    );
    home.rm(&["box"]);
}

#[test]
fn a_command_whose_output_nobody_reads_does_not_delay_another() {
    let home = Home::new(1);
    home.create("box", &[]);
    let (stalled, mut stdout) = home
        .smolvm(["exec", "box", "--", "head", "-c", "67108864", "/dev/zero"])
        .spawn_unread();
    let mut first = [1];
    stdout.read_exact(&mut first).expect("a first byte");
    // From here on nobody reads; 64 MiB fit into no queue.
    for number in 0..3 {
        let other = home.exec("box", &["echo", "through"]).ok();
        assert_eq!(
            other.out(),
            "through\n",
            "command {number} beside a stalled one"
        );
    }
    let tty = home
        .smolvm(["exec", "--tty", "box", "--", "echo", "through"])
        .run()
        .ok();
    assert_eq!(tty.out(), "through\r\n");
    assert!(
        stalled.is_running(),
        "a command whose output was not read has ended"
    );
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).expect("a pipe");
    assert_eq!(
        rest.len(),
        67_108_863,
        "the stalled command's output is not whole"
    );
    stalled.wait().ok();
    home.rm(&["box"]);
}
