//! SSH to sandboxes, with OpenSSH's own programs and rsync as the clients.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use smolvm_testkit::{Home, Invocation, Running, Terminal};

/// A data directory with one sandbox, `box`, and a configuration that knows it.
struct Reached {
    home: Home,
    config: PathBuf,
}

impl Reached {
    fn new(flags: &[&str]) -> Self {
        Self::with_settings("", flags)
    }

    fn with_settings(settings: &str, flags: &[&str]) -> Self {
        let home = Home::new(1);
        fs::write(home.data().join("config.toml"), settings).expect("written");
        home.create("box", flags);
        let config = home.scratch().join("config");
        let reached = Self { home, config };
        reached.configure();
        reached
    }

    /// Writes the configuration as it is now.
    fn configure(&self) {
        let printed = self.home.smolvm(["ssh-config", "box"]).run().ok();
        fs::write(&self.config, printed.out()).expect("written");
    }

    /// One of OpenSSH's programs, which reads our configuration and no other.
    fn client(&self, program: &str, args: &[&str]) -> Invocation {
        Invocation::new(program)
            .args(["-F", text(&self.config)])
            .args(args)
    }

    fn ssh(&self, args: &[&str]) -> Invocation {
        self.client("ssh", args)
    }

    fn scratch(&self, name: &str) -> PathBuf {
        self.home.scratch().join(name)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

/// Bytes that no two parts of are alike.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(count).collect()
}

#[test]
fn commands_and_terminals_are_as_on_any_server() {
    let box_ = Reached::new(&["--env", "OURS=1"]);
    let outcome = box_
        .ssh(&["box", "echo out; echo err >&2; echo $OURS; exit 7"])
        .run()
        .expect(7);
    assert_eq!((&*outcome.out(), &*outcome.err()), ("out\n1\n", "err\n"));
    // OpenSSH's client gives 255 for a command that a signal ended.
    box_.ssh(&["box", "kill -TERM $$"]).run().expect(255);
    let outcome = box_.ssh(&["nobody@box", "id -un"]).run();
    assert_eq!(outcome.out(), "This account is currently not available.\n");
    box_.ssh(&["nosuch@box", "true"])
        .run()
        .complains_of(&["there is no user \"nosuch\" in the guest"]);

    // Of the client's variables words and colours come through, and nothing else.
    let outcome = box_
        .ssh(&[
            "-o",
            "SetEnv=LC_TEST=kept NO_COLOR=2 LD_PRELOAD=/x EVIL=1",
            "box",
            "echo $LC_TEST.$NO_COLOR.$LD_PRELOAD.$EVIL; echo $SSH_CONNECTION",
        ])
        .run()
        .ok();
    let lines: Vec<String> = outcome.out().lines().map(str::to_owned).collect();
    assert_eq!(lines[0], "kept.2..");
    assert!(lines[1].starts_with("127.0.0.1 "), "{lines:?}");

    // 50 MiB there and back at the same time, through a command that waits for its output to be read.
    let all = bytes(50 * 1024 * 1024);
    let outcome = box_.ssh(&["box", "cat"]).stdin(all.clone()).run().ok();
    assert!(outcome.stdout == all, "{} bytes came", outcome.stdout.len());

    // A login shell without a terminal, fed with commands.
    let outcome = box_
        .ssh(&["-T", "box"])
        .stdin("echo $0; exit 5\n")
        .run()
        .expect(5);
    assert_eq!(outcome.out(), "-bash\n");

    // One with a terminal, which changes its size.
    let args = ["-F", text(&box_.config), "-t", "box"];
    let mut terminal = Terminal::run(Path::new("ssh"), &args, 31, 97);
    terminal.type_in(b"stty size; echo t=$TERM\n");
    terminal.wait_for("31 97");
    terminal.wait_for("t=xterm");
    terminal.resize(42, 111);
    terminal.type_in(b"until stty size | grep -q '42 111'; do :; done; echo bi''g\n");
    terminal.wait_for("big");
    // Ctrl-C reaches what runs in the foreground, and the shell goes on.
    terminal.type_in(
        b"sh -c 'trap \"echo cau''ght; exit\" INT; echo sta''rted; while :; do sleep 0.1; done'\n",
    );
    terminal.wait_for("started");
    terminal.type_in(b"\x03");
    terminal.wait_for("caught");
    terminal.type_in(b"exit 3\n");
    assert_eq!(terminal.wait(), Some(3));
    terminal.is_as_before();

    // What is left of a session whose client was killed is told to hang up.
    let running = box_.ssh(&["box", "echo $$; exec sleep 1000"]).spawn();
    running.wait_for("\n");
    running.signal(rustix::process::Signal::KILL);
    drop(running);
    box_.home
        .sh("box", "while pgrep -x sleep >/dev/null; do :; done");

    // An image without bash: the shell that every image has stands in.
    box_.home.sh("box", "rm /bin/bash");
    let outcome = box_.ssh(&["box", "echo $0 $SHELL"]).run().ok();
    assert_eq!(
        outcome.out(),
        "bash /bin/bash\n",
        "by the name of the user's"
    );
    box_.home.rm(&["box"]);
}

#[test]
fn files_go_both_ways_with_sftp_scp_and_rsync() {
    let box_ = Reached::new(&[]);
    let (local, back) = (box_.scratch("local"), box_.scratch("back"));
    let content = bytes(3_000_000);
    fs::create_dir_all(local.join("tree/sub dir")).expect("made");
    fs::write(local.join("tree/data"), &content).expect("written");
    fs::write(local.join("tree/sub dir/ümlaut"), "text").expect("written");
    std::os::unix::fs::symlink("data", local.join("tree/link")).expect("linked");
    let mode = fs::Permissions::from_mode(0o750);
    fs::set_permissions(local.join("tree/data"), mode).expect("set");

    let batch = format!(
        "pwd\nmkdir d\ncd d\nput \"{0}/tree/data\" one\nrename one two\nln -s two three\nls -l\n\
         get three \"{0}/three\"\nchmod 600 two\nrm three\nreget two \"{0}/two\"\ndf\nrm two\ncd ..\n\
         rmdir d\nls\n",
        text(&local)
    );
    let outcome = box_
        .client("sftp", &["-b", "-", "box"])
        .stdin(batch)
        .run()
        .ok();
    assert!(outcome.out().contains("Remote working directory: /root"));
    assert!(
        outcome
            .out()
            .contains("-rwxr-x---   1 root     root      3000000 "),
        "{outcome}"
    );
    for name in ["two", "three"] {
        assert!(fs::read(local.join(name)).expect("fetched") == content);
    }
    let outcome = box_
        .client("sftp", &["-b", "-", "box"])
        .stdin("get /etc/nosuch\n")
        .run()
        .expect(1);
    outcome.complains_of(&["not found"]);

    // scp speaks SFTP; with -O the old protocol, for which the image needs a program of that name.
    let tree = local.join("tree");
    box_.client("scp", &["-rp", text(&tree), "box:/srv/"])
        .run()
        .ok();
    assert_eq!(
        box_.home.sh(
            "box",
            "cat '/srv/tree/sub dir/ümlaut'; stat -c %a /srv/tree/data"
        ),
        "text750\n"
    );
    fs::create_dir(&back).expect("made");
    box_.client("scp", &["-r", "box:/srv/tree", text(&back)])
        .run()
        .ok();
    assert!(fs::read(back.join("tree/data")).expect("fetched") == content);
    box_.client("scp", &["-O", "box:/srv/tree/data", text(&back)])
        .run()
        .expect(1)
        .complains_of(&["scp"]);

    // rsync needs itself on the other side; the default image has none.
    put_rsync_into(&box_);
    let remote = format!("ssh -F '{}'", text(&box_.config));
    let rsync = |from: &str, to: &str| {
        Invocation::new("rsync")
            .args(["-a", "--delete", "--stats", "-e", &remote, from, to])
            .run()
            .ok()
    };
    let from = format!("{}/", text(&tree));
    rsync(&from, "box:/srv/synced/");
    let again = rsync(&from, "box:/srv/synced/");
    assert!(
        again
            .out()
            .contains("Number of regular files transferred: 0"),
        "{again}"
    );
    let target = back.join("synced");
    rsync("box:/srv/synced/", text(&target));
    assert!(fs::read(target.join("data")).expect("fetched") == content);
    assert_eq!(
        fs::read_link(target.join("link")).expect("a link"),
        Path::new("data")
    );
    box_.home.rm(&["box"]);
}

/// Puts this host's rsync into the sandbox with the libraries it needs, under a name of its own.
fn put_rsync_into(box_: &Reached) {
    let script = "set -e; program=$(command -v rsync); mkdir \"$1\"; cp -L \"$program\" \"$1/rsync\"; \
                  ldd \"$program\" | grep -o '/[^ ]*' | while read -r library; do \
                  cp -L \"$library\" \"$1/\"; done";
    let local = box_.scratch("rsync");
    let copied = Command::new("sh")
        .args(["-c", script, "sh", text(&local)])
        .status()
        .expect("a shell");
    assert!(copied.success(), "rsync and its libraries are on this host");
    box_.home
        .smolvm(["cp", text(&local), "box:/opt/"])
        .run()
        .ok();
    box_.home.sh(
        "box",
        "printf '#!/bin/sh\\nexec /opt/rsync/ld-linux-x86-64.so.2 --library-path /opt/rsync \
         /opt/rsync/rsync \"$@\"\\n' > /usr/local/bin/rsync; chmod +x /usr/local/bin/rsync",
    );
}

#[test]
fn keys_open_and_each_sandbox_is_known_by_its_own() {
    let keys = tempfile::tempdir().expect("a directory");
    let make = |name: &str| {
        let path = keys.path().join(name);
        Invocation::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", text(&path)])
            .run()
            .ok();
        path
    };
    let (theirs, strangers) = (make("theirs"), make("strangers"));
    let public = theirs.with_extension("pub");
    // A range of its own, so that no other test takes the port while it is free.
    let settings = "[ssh]\nports = \"3100-3101\"\n";
    let box_ = Reached::with_settings(settings, &["--ssh-key", text(&public)]);
    let home = &box_.home;
    let with_key = |key: &Path, command: &str| {
        let args = ["-i", text(key), "-o", "BatchMode=yes"];
        // The configuration's own key is tried after the one on the command line, so it is left out.
        let config = fs::read_to_string(&box_.config).expect("read");
        let other: Vec<&str> = config
            .lines()
            .filter(|line| !line.contains("IdentityFile"))
            .collect();
        let path = home.scratch().join("other");
        fs::write(&path, other.join("\n") + "\n").expect("written");
        Invocation::new("ssh")
            .args(["-F", text(&path)])
            .args(args)
            .args(["box", command])
            .run()
    };
    assert_eq!(with_key(&theirs, "echo in").ok().out(), "in\n");
    with_key(&strangers, "echo in")
        .expect(255)
        .complains_of(&["Permission denied (publickey)"]);

    // Another sandbox at this port is no secret to the client.
    let known = home.scratch().join("known");
    let line = fs::read_to_string(strangers.with_extension("pub")).expect("a key");
    let alias = fs::read_to_string(&box_.config).expect("read");
    let alias = alias
        .lines()
        .find_map(|line| line.trim().strip_prefix("HostKeyAlias "))
        .expect("an alias")
        .to_owned();
    fs::write(&known, format!("{alias} {line}")).expect("written");
    let option = format!("UserKnownHostsFile=\"{}\"", text(&known));
    box_.ssh(&["-o", &option, "box", "true"])
        .run()
        .expect(255)
        .complains_of(&["Host key verification failed"]);

    // `smolvm ssh` needs no configuration, and two at once are two.
    let first = home
        .smolvm(["ssh", "box", "--", "echo first; cat"])
        .open_stdin()
        .spawn();
    first.wait_for("first\n");
    home.smolvm(["ssh", "box", "--", "echo second; exit 9"])
        .run()
        .expect(9);

    // Stopping cuts it; the key and the port stay.
    let info = home.info("box");
    let port = info.json["ssh_port"].as_u64().expect("a port");
    // Those who have shown no key yet are few at a time; who is inside is not counted.
    let door = u16::try_from(port).expect("a port");
    let knock = || {
        let mut socket = TcpStream::connect(("127.0.0.1", door)).expect("a connection");
        matches!(socket.read(&mut [0; 4]), Ok(1..)).then_some(socket)
    };
    let crowd: Vec<_> = (0..200).map_while(|_| knock()).collect();
    assert_eq!(crowd.len(), 16);
    drop(crowd);
    assert!((0..100_000).any(|_| knock().is_some()), "it stays shut");

    home.smolvm(["stop", "box"]).run().ok();
    assert_ne!(first.wait().code, Some(0), "it was cut");
    home.smolvm(["ssh", "box", "--", "true"])
        .run()
        .expect(255)
        .complains_of(&["Connection refused"]);
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.info("box").json["ssh_port"].as_u64(), Some(port));
    box_.ssh(&["box", "true"]).run().ok();

    // A copy is another.
    home.smolvm(["fork", "box", "--prefix", "copy"]).run().ok();
    home.smolvm(["ssh", "copy-1", "--", "hostname"]).run().ok();
    let scan = |name: &str| {
        let port = home.info(name).json["ssh_port"].to_string();
        let found = Invocation::new("ssh-keyscan")
            .args(["-t", "ed25519", "-p", &port, "127.0.0.1"])
            .run()
            .ok();
        let key = found.out();
        key.split_whitespace().last().expect("a key").to_owned()
    };
    assert_ne!(scan("box"), scan("copy-1"));
    home.smolvm(["create", "--no-start", "--name", "more"])
        .run()
        .expect(1)
        .complains_of(&["no port for SSH is left", "3100-3101", "config.toml"]);
    home.rm(&["copy-1", "box"]);

    // Without SSH there is no port, and it is said what to do.
    home.create("shut", &["--no-ssh"]);
    assert!(home.info("shut").json["ssh_port"].is_null());
    home.smolvm(["ssh", "shut"])
        .run()
        .expect(2)
        .complains_of(&["is not reached by SSH", "smolvm shell shut"]);
    home.rm(&["shut"]);
}

/// Gives back what it gets on each connection, for ever.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut writer = socket.try_clone().expect("a socket");
                let _ = std::io::copy(&mut socket, &mut writer);
                let _ = writer.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    port
}

/// A port of this host that nobody has at this moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    listener.local_addr().expect("an address").port()
}

#[test]
fn connections_are_forwarded_both_ways() {
    let box_ = Reached::new(&[]);
    box_.home.sh(
        "box",
        "cat > /root/echo.py <<'E'\n\
         import socketserver\n\
         class Echo(socketserver.BaseRequestHandler):\n\
         \x20   def handle(self):\n\
         \x20       while data := self.request.recv(65536): self.request.sendall(data)\n\
         with socketserver.ThreadingTCPServer(('127.0.0.1', 7007), Echo) as server:\n\
         \x20   print('up', flush=True); server.serve_forever()\n\
         E\n\
         python3 /root/echo.py > /root/up 2>&1 & until grep -q up /root/up; do :; done",
    );
    let (local, outside) = (free_port(), echo());
    let forwards = [
        "-o".to_owned(),
        "ExitOnForwardFailure=yes".to_owned(),
        format!("-L127.0.0.1:{local}:localhost:7007"),
        format!("-R7008:127.0.0.1:{outside}"),
    ];
    let mut args: Vec<&str> = forwards.iter().map(String::as_str).collect();
    args.extend(["box", "echo up; cat"]);
    let session: Running = box_.ssh(&args).open_stdin().spawn();
    session.wait_for("up\n");

    // Into the sandbox: more than any window holds, and the end of one direction is the end of that.
    let sent = bytes(5_000_000);
    let mut socket = TcpStream::connect(("127.0.0.1", local)).expect("a connection");
    let mut writer = socket.try_clone().expect("a socket");
    let writing = {
        let sent = sent.clone();
        std::thread::spawn(move || {
            writer.write_all(&sent).expect("written");
            writer
                .shutdown(std::net::Shutdown::Write)
                .expect("shut down");
        })
    };
    let mut came = Vec::new();
    socket.read_to_end(&mut came).expect("read");
    writing.join().expect("no panic");
    assert!(came == sent, "{} bytes came", came.len());

    // Out of it.
    let script = "import socket, sys\n\
                  s = socket.create_connection(('127.0.0.1', 7008))\n\
                  data = b'x' * 1000000\n\
                  import threading\n\
                  threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()\n\
                  got = 0\n\
                  while part := s.recv(65536): got += len(part)\n\
                  print(got)\n";
    let outcome = box_
        .home
        .smolvm(["exec", "box", "--", "python3", "-"])
        .stdin(script)
        .run()
        .ok();
    assert_eq!(outcome.out(), "1000000\n");
    session.signal(rustix::process::Signal::TERM);
    session.wait();
    // With the connection the port in the guest goes.
    box_.home.sh(
        "box",
        "while grep -q ':1B60 .* 0A ' /proc/net/tcp; do :; done",
    );

    // Where nobody listens it is refused, and a port that is taken is said to be.
    box_.ssh(&["-W", "localhost:1", "box"])
        .run()
        .expect(255)
        .complains_of(&["open failed: connect failed"]);
    box_.ssh(&[
        "-o",
        "ExitOnForwardFailure=yes",
        "-R",
        "7007:localhost:1",
        "box",
        "true",
    ])
    .run()
    .expect(255)
    .complains_of(&["remote port forwarding failed"]);
    box_.home.rm(&["box"]);
}
