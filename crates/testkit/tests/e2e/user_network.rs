//! The network of who is not root: the same flags with the same meaning.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use smolvm_testkit::{
    HOST, Home, Lab, METADATA, OTHER_SERVER, PRIVATE_SERVER, Process, SERVER, may_network,
};

use crate::network::{DENIED, Site, UNKNOWN, have_addresses_of_their_own};

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// An ordinary user, on a host whose name server is on its loopback device.
fn site(machines: usize) -> Site {
    Site {
        home: Home::with(machines).ordinary_user().make(),
        lab: Lab::with_own_name_server(),
    }
}

/// The processes below a process, with their names.
fn children(of: &Process) -> Vec<(String, Process)> {
    let listed = Command::new("pgrep")
        .args(["--list-name", "--parent", &of.pid().to_string()])
        .output()
        .expect("pgrep");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut found: Vec<_> = text
        .lines()
        .map(|line| {
            let (pid, name) = line.split_once(' ').expect("a number and a name");
            let process = Process::open(pid.parse().expect("a number"));
            (name.to_owned(), process.expect("a process"))
        })
        .collect();
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    found
}

fn field(process: &Process, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()));
    let status = status.expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let word = line.unwrap_or_default().split_whitespace().next();
    word.unwrap_or_default().to_owned()
}

/// Serves one connection and one datagram at port 7000 of the guest, and answers with what came.
const ECHO: &str = r#"
import socket, subprocess, sys
if sys.argv[1:]:
    tcp = socket.create_server(("127.0.0.1", 7000))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 7000))
    print(flush=True)
    peer, _ = tcp.accept()
    peer.sendall(b"tcp " + peer.recv(100))
    peer.close()
    data, peer = udp.recvfrom(100)
    udp.sendto(b"udp " + data, peer)
else:
    server = subprocess.Popen(["python3", "/tmp/echo.py", "serve"], stdout=subprocess.PIPE)
    server.stdout.readline()
"#;

#[test]
fn an_ordinary_users_sandbox_reaches_what_its_network_lets_it() {
    if !may_network() {
        return;
    }
    let site = site(2);
    let host = HOST.to_string();
    let us = host.as_str();
    let other = OTHER_SERVER.to_string();
    site.lab.name("good.example", SERVER);
    site.lab.name("other.example", OTHER_SERVER);
    site.lab.name("evil.below.example", METADATA);
    // The host's own link takes a moment to be noticed.
    site.smolvm(&["run", "--network", "open", "--", "true"]);
    let picture = site.lab.picture();
    let words = [
        &["create", "--name", "box"],
        &["--allow", "good.example", "--allow", "*.below.example"][..],
        &["-p", "7000", "-p", "7000/udp"],
    ];
    site.smolvm(&words.concat());
    let info = site.json(&["info", "box"]);
    assert_eq!(info["vm"]["network_mode"], "user", "{info:#}");
    let shown = site.json(&["network", "show", "box"]);
    assert_eq!(shown["network"]["mode"], "user", "{shown:#}");
    assert_eq!(site.lab.picture(), picture, "the host is as it was");

    // By name and by address. To the server it is the host, as with root's.
    assert_eq!(
        site.reach(
            "box",
            &[
                "good.example",
                "other.example",
                "evil.below.example",
                &other
            ]
        ),
        [us, UNKNOWN, UNKNOWN, DENIED]
    );
    // Whole conversations, which the guest begins.
    site.talk("box");
    // What nobody reaches.
    let never = [HOST, PRIVATE_SERVER, METADATA, Ipv4Addr::new(172, 16, 0, 1)];
    let never = never.map(|address| address.to_string());
    let never: Vec<_> = never.iter().map(String::as_str).collect();
    assert_eq!(site.reach("box", &never), [DENIED; 4]);
    let log = site.smolvm(&["network", "log", "box"]);
    for denied in ["other.example", "169.254.169.254", "203.0.113.1"] {
        assert!(log.contains(denied), "{log}");
    }

    // The keeper has two children, and only it has rights: over its own network.
    let keeper = site.home.info("box").keeper();
    assert_ne!(field(&keeper, "Uid:"), "0");
    let helpers = children(&keeper);
    let names: Vec<_> = helpers.iter().map(|(name, _)| name.as_str()).collect();
    let pasta = names.iter().position(|name| name.starts_with("pas"));
    let machine = match (names.len(), pasta) {
        (2, Some(pasta)) => &helpers[1 - pasta].1,
        _ => panic!("{names:?}"),
    };
    assert_eq!(field(machine, "CapEff:"), "0000000000000000");
    let own = |process: &Process| std::fs::read_link(format!("/proc/{}/ns/net", process.pid()));
    assert_ne!(
        own(machine).expect("a namespace"),
        std::fs::read_link("/proc/self/ns/net").expect("a namespace")
    );

    // Published ports are the host's.
    let send = site
        .home
        .smolvm(["exec", "box", "-i", "--", "sh", "-c", "cat > /tmp/echo.py"]);
    site.lab.run(send.stdin(ECHO)).ok();
    site.smolvm(&["exec", "box", "--", "python3", "/tmp/echo.py"]);
    let ports = site.json(&["port", "list", "box"]);
    let port = |protocol: &str| {
        let all = ports["ports"].as_array().expect("a list");
        let port = all.iter().find(|port| port["protocol"] == protocol);
        let port = port.expect("it is published")["host_port"].as_u64();
        let port = u16::try_from(port.expect("a number")).expect("a port");
        SocketAddr::from((Ipv4Addr::LOCALHOST, port))
    };
    let (tcp, udp) = (port("tcp"), port("udp"));
    let said = site.lab.host.run(move || {
        let mut stream = TcpStream::connect(tcp).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(b"one").expect("sent");
        let mut said = String::new();
        stream.read_to_string(&mut said).expect("an answer");
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.send_to(b"two", udp).expect("sent");
        let mut datagram = [0; 100];
        let length = socket.recv(&mut datagram).expect("an answer");
        said + ", " + &String::from_utf8_lossy(&datagram[..length])
    });
    assert_eq!(said, "tcp one, udp two");

    // A port that is published while it runs is the host's too.
    let exposed = site.json(&["port", "expose", "box", "7001"]);
    let exposed = exposed["ports"][0]["host_port"].as_u64().expect("a number");
    let listening = site.lab.host.sh("ss -lnt");
    assert!(
        listening.contains(&format!("127.0.0.1:{exposed}")),
        "{listening}"
    );

    // Not another sandbox, by its address.
    site.smolvm(&["create", "--name", "second", "--network", "open"]);
    let second = site.address("second");
    assert_ne!(second, site.address("box"));
    site.smolvm(&["network", "set", "box", "--network", "open"]);
    assert_eq!(
        site.reach("box", &["other.example", &second, us]),
        [us, DENIED, DENIED]
    );
    // An address that the host is given later is the host's.
    let late = "198.51.100.77";
    site.lab
        .host
        .sh(&format!("ip address add {late}/32 dev up0"));
    // The keeper hears of it when the kernel has told; the connection takes far longer.
    assert_eq!(site.reach("box", &[late]), [DENIED]);
    site.smolvm(&["network", "set", "box", "--network", "off"]);
    assert_eq!(
        site.reach("box", &["good.example", &other]),
        [UNKNOWN, DENIED]
    );

    // Whoever kills pasta has a sandbox without a network for a moment.
    site.smolvm(&["network", "set", "box", "--network", "open"]);
    let (_, pasta) = &helpers[pasta.expect("found")];
    pasta.signal(Signal::KILL);
    pasta.wait("pasta");
    let again = (0..20).any(|_| site.reach("box", &["good.example"]) == [us]);
    assert!(again, "another takes its place");
    let helpers = children(&keeper);
    assert_eq!(helpers.len(), 2, "{helpers:?}");

    // Nothing outlives a killed keeper, and whoever looks next repairs.
    keeper.signal(Signal::KILL);
    keeper.wait("the killed keeper");
    for (name, process) in &helpers {
        process.wait(name);
    }
    let left = site.json(&["info", "box"]);
    assert_eq!(left["vm"]["status"], "error", "{left:#}");
    site.smolvm(&["network", "set", "box", "--allow", "198.51.100.10"]);
    site.smolvm(&["start", "box"]);
    assert_eq!(site.reach("box", &["198.51.100.10", &other]), [us, DENIED]);
    let pasta = children(&site.home.info("second").keeper()).swap_remove(0);
    site.smolvm(&["rm", "box", "second"]);
    pasta.1.wait(&pasta.0);
    site.home.is_clean();
    site.lab
        .host
        .sh(&format!("ip address del {late}/32 dev up0"));
    assert_eq!(site.lab.picture(), picture);
}

#[test]
fn copies_and_members_of_pools_are_an_ordinary_users_too() {
    if may_network() {
        have_addresses_of_their_own(&site(3));
    }
}

#[test]
fn who_may_not_make_a_network_is_told_so_and_can_do_without() {
    if !may_network() {
        return;
    }
    let site = site(1);
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("zero"), "0\n").expect("a file");
    let zero = dir.path().join("zero");
    let zero = zero.to_str().expect("text");
    // What is in the way, what is said of it, and what of the help.
    let ways = [
        (
            "mount -t tmpfs none /dev/net".to_owned(),
            "permission_denied",
            "/dev/net/tun cannot be opened",
            "modprobe tun",
        ),
        (
            format!("mount --bind {zero} /proc/sys/user/max_user_namespaces"),
            "permission_denied",
            "user.max_user_namespaces is 0",
            "sysctl -w user.max_user_namespaces",
        ),
        (
            "mount --bind /dev/null \"$(command -v pasta)\"".to_owned(),
            "missing_dependency",
            "pasta",
            "passt",
        ),
    ];
    for (way, kind, why, help) in ways {
        let smolvm = |words: &[&str]| {
            let script = format!("{way} && exec \"$0\" \"$@\"");
            let run = site.home.smolvm(words);
            site.lab.run(run.within(["sh", "-c", &script]))
        };
        let refused = smolvm(&["--json", "create", "--network", "open"]).expect(1);
        let refused = refused.json();
        let error = &refused["error"];
        assert_eq!(error["details"]["kind"], kind, "{error:#}");
        let text = error.to_string();
        assert!(text.contains(why) && text.contains(help), "{error:#}");
        let check = smolvm(&["--json", "doctor"]).json();
        let checks = check["data"]["checks"].as_array().expect("a list").iter();
        let check = checks.clone().find(|check| check["name"] == "network");
        let check = check.expect("it is checked").to_string();
        assert!(
            check.contains("warn") && check.contains(why) && check.contains(help),
            "{check}"
        );
        let shown = smolvm(&["--json", "network", "show"]).ok().json();
        assert_eq!(shown["data"]["network"]["permitted"], false, "{shown:#}");
        assert_eq!(site.home.states(), []);
    }
    let doctor = site.home.smolvm(["doctor"]);
    let doctor = site.lab.run(doctor).out();
    assert!(doctor.contains("network: user: "), "{doctor}");
    let without = "mount -t tmpfs none /dev/net && exec \"$0\" \"$@\"";
    let without = site
        .home
        .smolvm(["run", "--network", "off", "--", "echo", "fine"])
        .within(["sh", "-c", without]);
    assert_eq!(site.lab.run(without).ok().out(), "fine\n");
    site.home.is_clean();
}
