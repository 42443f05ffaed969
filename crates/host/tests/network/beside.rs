//! Beside other firewalls, and forwarding that is switched on and off again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smolvm_host::net::docker::{self, Obstacle};
use smolvm_host::net::forwarding::Forwarding;
use smolvm_host::net::nft::{Policy, Reach};
use smolvm_host::{Faults, HostErrorKind, Os};

use crate::lab::{HELLO_PORT, HOST, Lab, METADATA, Namespace, Outcome, SERVER, may_run};

/// What Docker does to iptables when it starts.
fn docker(host: &Namespace) {
    for command in [
        "-P FORWARD DROP",
        "-N DOCKER-USER",
        "-N DOCKER-FORWARD",
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-FORWARD",
        "-A DOCKER-USER -i docker9 -j RETURN",
    ] {
        host.sh(&format!("iptables-nft {command}"));
    }
}

#[test]
fn guests_get_through_dockers_firewall_and_it_is_as_before_afterwards() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(Reach::Open));
    let on_host = |work: fn(&Os)| lab.host.run(move || work(&Os::new()));
    on_host(|os| {
        assert!(!docker::let_through(os).expect("no such chain"));
        assert_eq!(docker::obstacles(os).expect("a list"), []);
    });
    docker(&lab.host);
    let before = lab.host.sh("iptables-nft -S");
    assert!(before.contains("-P FORWARD DROP"), "{before}");
    on_host(|os| {
        let obstacle = Obstacle::DroppingChain {
            table: "filter".to_owned(),
            chain: "FORWARD".to_owned(),
        };
        assert_eq!(docker::obstacles(os).expect("a list"), [obstacle]);
        for _ in 0..2 {
            assert!(docker::let_through(os).expect("let through"));
        }
        assert_eq!(docker::obstacles(os).expect("a list"), []);
    });
    assert_eq!(
        guest.connect(SERVER, HELLO_PORT),
        Outcome::From(HOST.to_string())
    );
    assert_eq!(guest.connect(METADATA, HELLO_PORT), Outcome::Denied);
    let during = lab.host.sh("iptables-nft -S DOCKER-USER");
    assert_eq!(
        during.lines().collect::<Vec<_>>(),
        [
            "-N DOCKER-USER",
            "-A DOCKER-USER -i smol+ -m comment --comment smolvm -j ACCEPT",
            "-A DOCKER-USER -o smol+ -m comment --comment smolvm -j ACCEPT",
            "-A DOCKER-USER -i docker9 -j RETURN",
        ]
    );
    on_host(|os| {
        docker::undo(os).expect("undone");
        docker::undo(os).expect("undone");
    });
    assert_eq!(lab.host.sh("iptables-nft -S"), before);
}

fn setting(lab: &Lab, device: &str) -> String {
    let path: PathBuf = ["/proc/sys/net/ipv4/conf", device, "forwarding"]
        .iter()
        .collect();
    lab.host
        .run(move || fs::read_to_string(path).expect("a setting"))
        .trim()
        .to_owned()
}

#[test]
fn forwarding_is_on_where_default_routes_lead_and_is_undone() {
    if !may_run() {
        return;
    }
    let lab = Lab::new();
    lab.host.sh("ip link add side0 type veth peer name side1");
    let dir = tempfile::tempdir().expect("a directory");
    let record = dir.path().join("forwarding.json");
    let with = |work: fn(&Forwarding)| {
        let record = record.clone();
        lab.host
            .run(move || work(&Forwarding::new(Os::new(), record)));
    };
    let all = || ["up0", "side0", "all"].map(|device| setting(&lab, device));
    assert_eq!(all(), ["0", "0", "0"]);
    with(|forwarding| {
        assert_eq!(forwarding.enable(&[]).expect("on"), ["up0"]);
        assert!(forwarding.enable(&[]).expect("on").is_empty());
    });
    assert_eq!(all(), ["1", "0", "0"]);
    with(|forwarding| {
        assert_eq!(forwarding.enable(&["side0"]).expect("on"), ["side0"]);
        let error = forwarding.enable(&["nothing0"]).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound, "{error:?}");
    });
    assert_eq!(all(), ["1", "1", "0"]);
    lab.host.sh("ip link delete side0");
    with(|forwarding| {
        forwarding.undo().expect("off");
        forwarding.undo().expect("off");
    });
    assert_eq!(setting(&lab, "up0"), "0");
    assert!(!record.exists());
}

#[test]
fn a_host_that_became_a_router_stays_one() {
    if !may_run() {
        return;
    }
    let lab = Lab::new();
    let dir = tempfile::tempdir().expect("a directory");
    let record = dir.path().join("forwarding.json");
    lab.host.run(move || {
        let forwarding = Forwarding::new(Os::new(), record);
        forwarding.enable(&[]).expect("on");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("a router");
        forwarding.undo().expect("forgotten");
    });
    assert_eq!(setting(&lab, "up0"), "1");
}

/// Fails the step of that name.
#[derive(Debug)]
struct Step(&'static str);

impl Faults for Step {
    fn before(&self, op: &'static str, path: &Path) -> io::Result<()> {
        let is_setting = path.starts_with("/proc/sys");
        if op == self.0 && (op != "write" || is_setting) {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        Ok(())
    }
}

#[test]
fn what_is_switched_on_is_written_down_before() {
    if !may_run() {
        return;
    }
    for step in ["write the record of forwarding", "write"] {
        let lab = Lab::new();
        let dir = tempfile::tempdir().expect("a directory");
        let record = dir.path().join("forwarding.json");
        let place = record.clone();
        let hint = lab.host.run(move || {
            let os = Os::with_faults(Arc::new(Step(step)));
            let error = Forwarding::new(os, place).enable(&[]).unwrap_err();
            assert_eq!(error.kind(), HostErrorKind::PermissionDenied, "{error:?}");
            error.hint().map(str::to_owned)
        });
        assert_eq!(setting(&lab, "up0"), "0");
        assert_eq!(record.exists(), step == "write");
        assert_eq!(hint.is_some(), step == "write");
    }
}
