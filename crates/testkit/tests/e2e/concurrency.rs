//! Many commands at once in one sandbox.

use smolvm_testkit::Home;

#[test]
fn fifty_commands_at_once_each_get_their_own_output() {
    let home = Home::new(1);
    home.create("box", &[]);
    let script = "read word; i=0; while [ $i -lt 20 ]; do
        echo out-$word-$1; echo err-$word-$1 >&2; i=$((i+1)); done; exit $1";
    let commands: Vec<_> = (0..50)
        .map(|number: i32| {
            let marker = number.to_string();
            home.smolvm(["exec", "box", "--", "sh", "-c", script, "sh", &marker])
                .stdin(format!("word{number}\n"))
                .spawn()
        })
        .collect();
    for (number, command) in (0..).zip(commands) {
        let finished = command.wait().expect(number);
        assert_eq!(
            finished.out(),
            format!("out-word{number}-{number}\n").repeat(20)
        );
        assert_eq!(
            finished.err(),
            format!("err-word{number}-{number}\n").repeat(20)
        );
    }
    home.rm(&["box"]);
}
