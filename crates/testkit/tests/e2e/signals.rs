//! Signals and terminals reach the guest's command, and the caller stays in charge.

use rustix::process::Signal;
use smolvm_testkit::Home;

/// Says so when a signal comes, and ends with code 42. The sleep is waited for with the shell's
/// `wait`, which signals interrupt.
const TRAPS: &str = "sleep 1000 & trap 'echo interrupted; kill $!; exit 42' INT; \
                     trap 'echo terminated; kill $!; exit 43' TERM; echo ready; wait";

#[test]
fn an_interrupt_and_a_termination_reach_the_guests_command() {
    let home = Home::new(1);
    home.create("box", &[]);
    for (signal, word, code) in [
        (Signal::INT, "interrupted", 42),
        (Signal::TERM, "terminated", 43),
    ] {
        let exec = home
            .smolvm(["exec", "box", "--", "sh", "-c", TRAPS])
            .spawn();
        exec.wait_for("ready\n");
        exec.signal(signal);
        let finished = exec.wait().expect(code);
        assert_eq!(finished.out(), format!("ready\n{word}\n"));
    }
    // One that does not care dies of it, as it would here.
    let exec = home
        .smolvm([
            "exec",
            "box",
            "--",
            "sh",
            "-c",
            "echo ready; exec sleep 1000",
        ])
        .spawn();
    exec.wait_for("ready\n");
    exec.signal(Signal::INT);
    exec.wait().expect(130);
    home.rm(&["box"]);
}

#[test]
fn a_second_interrupt_gives_up_and_leaves_nothing() {
    let home = Home::new(1);
    let stubborn = "trap 'echo ignored' INT; echo ready; while :; do sleep 1000 & wait; done";
    let run = home.smolvm(["run", "--", "sh", "-c", stubborn]).spawn();
    run.wait_for("ready\n");
    run.signal(Signal::INT);
    run.wait_for("ignored\n");
    assert!(
        run.is_running(),
        "one interrupt is the command's own affair"
    );
    run.signal(Signal::INT);
    run.wait().expect(130);
    home.is_clean();
}

#[test]
fn an_interrupt_while_the_guest_boots_leaves_nothing() {
    use smolvm_testkit::Entries;
    let home = Home::new(1);
    for command in [&["run", "--", "true"][..], &["create"]] {
        let sandboxes = Entries::watch(&home.data().join("sandboxes"));
        let booting = home.smolvm(command).env("SMOLVM_NO_TEMPLATES", "1").spawn();
        let dir = sandboxes.wait_for("the sandbox's directory", |_| true);
        Entries::watch(&dir).wait_for("console.log", |name| name == "console.log");
        booting.signal(Signal::INT);
        booting.wait().expect(130);
        home.is_clean();
    }
}

#[test]
fn a_terminal_is_one_on_both_sides() {
    let home = Home::new(1);
    home.create("box", &[]);
    let script = "test -t 0 && test -t 1 && test -t 2 && echo on a $TERM; stty size; sleep 1000 & \
                  trap 'stty size' WINCH; trap 'echo interrupted; kill $!; exit 42' INT; \
                  echo ready; while :; do wait; done";
    let mut terminal = home.terminal(&["exec", "-it", "box", "--", "sh", "-c", script]);
    terminal.wait_for("ready\r\n");
    assert!(
        terminal.screen().contains("on a xterm\r\n24 80\r\n"),
        "{}",
        terminal.screen()
    );
    terminal.resize(40, 132);
    terminal.wait_for("40 132\r\n");
    terminal.type_in(b"\x03");
    terminal.wait_for("interrupted\r\n");
    assert_eq!(
        terminal.wait(),
        Some(42),
        "Ctrl-C is the guest's; the screen was:\n{}",
        terminal.screen()
    );
    terminal.is_as_before();

    // The end of the file, as typed.
    let mut terminal = home.terminal(&["exec", "-it", "box", "--", "cat"]);
    terminal.type_in(b"typed\r");
    terminal.wait_for("typed\r\ntyped\r\n");
    terminal.type_in(b"\x04");
    assert_eq!(
        terminal.wait(),
        Some(0),
        "the screen was:\n{}",
        terminal.screen()
    );

    let mut terminal = home.terminal(&["shell", "box"]);
    terminal.type_in(b"tty; exit $((6*7))\r");
    assert_eq!(
        terminal.wait(),
        Some(42),
        "the screen was:\n{}",
        terminal.screen()
    );
    // What reads the screen may be behind the program's end.
    terminal.wait_for("/dev/pts/");
    terminal.is_as_before();
    home.rm(&["box"]);
}
