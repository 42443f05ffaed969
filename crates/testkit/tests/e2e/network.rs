//! What sandboxes reach, with real packets, in network namespaces of the tests' own.

use std::net::Ipv4Addr;

use serde_json::Value;
use smolvm_testkit::{
    ECHO_PORT, HOST, Home, Lab, METADATA, OTHER_SERVER, PRIVATE_SERVER, SERVER, may_network,
};

/// Says for each address what became of a connection to it: the address the other end saw, or the
/// name of the error.
const TRY: &str = "
import errno, socket, sys
for to in sys.argv[1:]:
    try:
        s = socket.create_connection((to, 80), 15)
        print(s.makefile().read())
    except socket.gaierror as e:
        print('no address')
    except OSError as e:
        print(errno.errorcode.get(e.errno, e))
";

/// Sends bytes to an address, and compares what comes back.
const TALK: &str = "
import random, socket, sys
data = random.Random(1).randbytes(3_000_000)
for size in (1, 3_000_000):
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
    s.sendall(size.to_bytes(4, 'little') + data[:size])
    print(s.makefile('rb').read() == data[:size])
";

#[test]
fn a_sandbox_reaches_what_its_network_lets_it_and_leaves_nothing() {
    if !may_network() {
        return;
    }
    let (home, lab) = (Home::new(1), Lab::new());
    let run = |flags: &[&str], to: &[Ipv4Addr]| {
        let to = to.iter().map(ToString::to_string);
        let run = home
            .smolvm(["run"])
            .args(flags)
            .args(["--", "python3", "-c", TRY])
            .args(to);
        lab.run(run).ok().out()
    };
    let (host, denied) = (HOST.to_string(), "EHOSTUNREACH");
    let us = host.as_str();
    let everywhere = [SERVER, OTHER_SERVER, PRIVATE_SERVER, METADATA, HOST];
    // By the host's address: it is translated.
    let open = run(&["--network", "open"], &everywhere);
    assert_eq!(
        open.lines().collect::<Vec<_>>(),
        [us, us, denied, denied, denied]
    );
    home.is_clean();
    let picture = lab.picture();
    let talk = [
        "--",
        "python3",
        "-c",
        TALK,
        &SERVER.to_string(),
        &ECHO_PORT.to_string(),
    ];
    let talk = home.smolvm(["run", "--network", "open"]).args(talk);
    assert_eq!(lab.run(talk).ok().out(), "True\nTrue\n");

    let listed = run(
        &["--allow", "198.51.100.10", "--allow", "10.0.0.0/8"],
        &everywhere,
    );
    assert_eq!(
        listed.lines().collect::<Vec<_>>(),
        [us, denied, us, denied, denied]
    );
    // Nothing by default: there is no device.
    let off = run(&[], &[SERVER]);
    assert_eq!(off, "ENETUNREACH\n");
    home.is_clean();
    assert_eq!(lab.picture(), picture);
    assert_eq!(lab.hello(SERVER), us);
}

#[test]
fn the_last_address_is_had_again_as_soon_as_its_sandbox_is_deleted() {
    if !may_network() {
        return;
    }
    let site = Site::new(1);
    let settings = site.home.data().join("config.toml");
    std::fs::write(settings, "[network]\nprefix = \"172.30.9.0/30\"\n").expect("settings");
    let create = |name| {
        let words = ["create", "--name", name, "--network", "open"];
        site.lab.run(site.home.smolvm(words))
    };
    create("first").ok();
    create("second").expect(1).complains_of(&[
        "all 1 addresses of the network 172.30.9.0/30",
        "network.prefix",
    ]);
    // Whoever deletes is answered before the keeper has given everything back.
    for _ in 0..4 {
        site.smolvm(&["rm", "first"]);
        create("first").ok();
    }
    assert_eq!(site.address("first"), "172.30.9.2");
    assert_eq!(site.json(&["ls"])["vms"][0]["ip_address"], "172.30.9.2");
    site.smolvm(&["rm", "first"]);
    site.home.is_clean();
}

/// A home whose sandboxes are on a lab's host.
pub(crate) struct Site {
    pub(crate) home: Home,
    pub(crate) lab: Lab,
}

impl Site {
    fn new(machines: usize) -> Self {
        Self {
            home: Home::new(machines),
            lab: Lab::new(),
        }
    }

    pub(crate) fn smolvm(&self, words: &[&str]) -> String {
        self.lab.run(self.home.smolvm(words)).ok().out()
    }

    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let words = [&["--json"], words].concat();
        self.lab.run(self.home.smolvm(words)).ok().json()["data"].clone()
    }

    /// Sends a sandbox's bytes to the server and back, a few and many.
    pub(crate) fn talk(&self, name: &str) {
        let to = [SERVER.to_string(), ECHO_PORT.to_string()];
        let words = ["exec", name, "--", "python3", "-c", TALK, &to[0], &to[1]];
        assert_eq!(self.smolvm(&words), "True\nTrue\n");
    }

    /// What became of connections of a sandbox to names or addresses.
    pub(crate) fn reach(&self, name: &str, to: &[&str]) -> Vec<String> {
        let words = [&["exec", name, "--", "python3", "-c", TRY], to].concat();
        self.smolvm(&words).lines().map(str::to_owned).collect()
    }

    pub(crate) fn address(&self, name: &str) -> String {
        let address = &self.json(&["info", name])["vm"]["ip_address"];
        address.as_str().expect("an address").to_owned()
    }
}

pub(crate) const DENIED: &str = "EHOSTUNREACH";
pub(crate) const UNKNOWN: &str = "no address";

#[test]
fn names_are_followed_and_a_policy_changes_at_once() {
    if !may_network() {
        return;
    }
    let site = Site::new(1);
    let host = HOST.to_string();
    let us = host.as_str();
    let other = OTHER_SERVER.to_string();
    site.lab.name("good.example", SERVER);
    site.lab.name("other.example", OTHER_SERVER);
    site.lab.name("evil.below.example", PRIVATE_SERVER);
    let allow = ["--allow", "good.example", "--allow", "*.below.example"];
    site.smolvm(&[&["create", "--name", "box"], &allow[..]].concat());
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
    // The name leads elsewhere now.
    site.lab.name("good.example", OTHER_SERVER);
    assert_eq!(site.reach("box", &["good.example"]), [us]);

    let log = site.json(&["network", "log", "box"]);
    let seen = |what: &str, name: Option<&str>, address: Option<Ipv4Addr>| {
        let address = address.map(|address| address.to_string());
        let all = log["denied"].as_array().expect("a list").iter();
        all.filter(|one| one["what"] == what && one["count"].as_u64() >= Some(1))
            .any(|one| {
                one["name"].as_str() == name && one["address"].as_str() == address.as_deref()
            })
    };
    assert!(seen("lookup", Some("other.example"), None), "{log:#}");
    assert!(
        seen("lookup", Some("evil.below.example"), Some(PRIVATE_SERVER)),
        "{log:#}"
    );
    // It was denied before a name that is allowed led there.
    assert!(
        seen("tcp", Some("good.example"), Some(OTHER_SERVER)),
        "{log:#}"
    );

    site.smolvm(&["network", "set", "box", "--network", "off"]);
    assert_eq!(
        site.reach("box", &["good.example", &other]),
        [UNKNOWN, DENIED]
    );

    // Whoever empties the firewall does not open it, and it is there again.
    site.smolvm(&["network", "set", "box", "--network", "open"]);
    site.lab.host.sh("nft flush ruleset");
    assert_eq!(
        site.reach("box", &["other.example", &METADATA.to_string()]),
        [us, DENIED]
    );
    let refused = site.home.smolvm(["--json", "network", "reset"]);
    let refused = site.lab.run(refused).expect(1).json();
    assert_eq!(refused["error"]["details"]["kind"], "busy", "{refused:#}");

    // What was denied is still known when it is off, and its next start is as it was set last.
    site.smolvm(&["stop", "box"]);
    let log = site.smolvm(&["network", "log", "box"]);
    assert!(log.contains("169.254.169.254"), "{log}");
    site.smolvm(&["network", "set", "box", "--allow", "198.51.100.10"]);
    site.smolvm(&["start", "box"]);
    assert_eq!(site.reach("box", &["198.51.100.10", &other]), [us, DENIED]);
    site.smolvm(&["rm", "box"]);
    site.smolvm(&["network", "reset"]);
    site.home.is_clean();
    assert_eq!(site.lab.host.sh("nft list ruleset"), "");
    let forwarding = site
        .lab
        .host
        .sh("cat /proc/sys/net/ipv4/conf/up0/forwarding");
    assert_eq!(forwarding, "0\n");
}

#[test]
fn copies_and_members_of_pools_have_addresses_of_their_own() {
    if !may_network() {
        return;
    }
    have_addresses_of_their_own(&Site::new(3));
}

pub(crate) fn have_addresses_of_their_own(site: &Site) {
    let host = HOST.to_string();
    let us = host.as_str();
    let server = SERVER.to_string();
    site.smolvm(&["create", "--name", "a", "--network", "open"]);
    site.smolvm(&["fork", "a", "--count", "1"]);
    let (a, child) = (site.address("a"), site.address("a-1"));
    assert_ne!(a, child);
    for name in ["a", "a-1"] {
        assert_eq!(site.reach(name, &[&server]), [us], "{name}");
    }
    // Neither the other, nor by a made-up address of the other's.
    assert_eq!(site.reach("a", &[&child]), [DENIED]);
    let mac = |name: &str| site.smolvm(&["exec", name, "--", "cat", "/sys/class/net/eth0/address"]);
    assert_ne!(mac("a"), mac("a-1"));
    site.smolvm(&["rm", "a-1"]);

    site.smolvm(&["snapshot", "create", "a", "--name", "s"]);
    site.smolvm(&["rm", "a"]);
    site.smolvm(&["snapshot", "restore", "s", "--name", "b"]);
    assert_eq!(site.reach("b", &[&server]), [us]);
    site.smolvm(&["rm", "b"]);
    site.smolvm(&["snapshot", "rm", "s"]);

    site.smolvm(&["pool", "set", "--size", "1", "--network"]);
    site.smolvm(&["create", "--name", "c", "--allow", &server]);
    let to = [&*server, "198.51.100.20"];
    assert_eq!(site.reach("c", &to), [us, DENIED]);
    let pools = site.json(&["pool", "ls"]);
    assert_eq!(pools["pools"][0]["hits"], 1, "{pools:#}");
    site.smolvm(&["pool", "rm", "--network"]);
    site.smolvm(&["rm", "c"]);
    site.home.is_clean();
}

#[test]
fn a_killed_keepers_network_is_taken_away() {
    if !may_network() {
        return;
    }
    let site = Site::new(1);
    site.smolvm(&["run", "--network", "open", "--", "true"]);
    site.home.is_clean();
    let before = site.lab.picture();
    site.smolvm(&["create", "--name", "box", "--network", "open"]);
    let keeper = site.home.info("box").keeper();
    keeper.signal(rustix::process::Signal::KILL);
    keeper.wait("the killed keeper");
    // Whoever looks next repairs, here in the sandboxes' own namespace.
    let box_state = site.json(&["info", "box"]);
    assert_eq!(box_state["vm"]["status"], "error", "{box_state:#}");
    assert_eq!(site.lab.picture(), before);
    site.smolvm(&["rm", "box"]);
    site.home.is_clean();
}
