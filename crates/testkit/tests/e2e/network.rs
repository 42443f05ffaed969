//! What sandboxes reach, with real packets, in network namespaces of the tests' own.

use smolvm_testkit::{
    HOST, Home, Lab, METADATA, OTHER_SERVER, PRIVATE_SERVER, SERVER, may_network,
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

#[test]
fn a_sandbox_reaches_what_its_network_lets_it_and_leaves_nothing() {
    if !may_network() {
        return;
    }
    let (home, lab) = (Home::new(1), Lab::new());
    let run = |flags: &[&str], to: &[std::net::Ipv4Addr]| {
        let to = to.iter().map(ToString::to_string);
        let run = home
            .smolvm(["run"])
            .args(flags)
            .args(["--", "python3", "-c", TRY])
            .args(to);
        lab.run(run).ok().out()
    };
    let (us, denied) = (HOST.to_string(), "EHOSTUNREACH");
    let everywhere = [SERVER, OTHER_SERVER, PRIVATE_SERVER, METADATA, HOST];
    // By the host's address: it is translated.
    let open = run(&["--network", "open"], &everywhere);
    assert_eq!(
        open.lines().collect::<Vec<_>>(),
        [&us, &us, denied, denied, denied]
    );
    home.is_clean();
    let picture = lab.picture();

    let listed = run(
        &["--allow", "198.51.100.10", "--allow", "10.0.0.0/8"],
        &everywhere,
    );
    assert_eq!(
        listed.lines().collect::<Vec<_>>(),
        [&us, denied, &us, denied, denied]
    );
    // Nothing by default: there is no device.
    let off = run(&[], &[SERVER]);
    assert_eq!(off, "ENETUNREACH\n");
    home.is_clean();
    assert_eq!(lab.picture(), picture);
    assert_eq!(lab.hello(SERVER), us);
}
