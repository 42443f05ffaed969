//! Published ports: the engine and the keeper together, on the fake backend.

mod support;

use std::collections::BTreeSet;
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use smolvm_engine::store::Store;
use smolvm_engine::{Engine, Error, ErrorKind, HostPort, PublishedPort};
use support::{Home, output, spec};
use tokio::sync::Mutex;

/// One test at a time: what is open here, a port or a lock, is open as well in each child of another
/// test until that executes its program, and is free only when the last has closed it.
static ALONE: Mutex<()> = Mutex::const_new(());

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

fn port(text: &str) -> PublishedPort {
    text.parse().expect("a port")
}

fn ports(engine: &Engine, name: &str) -> Vec<PublishedPort> {
    engine.info(name).expect("it is there").ports
}

fn connect(host: &HostPort) -> TcpStream {
    let socket = TcpStream::connect(host.socket_address()).expect("it is published");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    socket
}

/// Sends a question with its end, and returns what comes back until the end.
fn ask(host: &HostPort, question: &str) -> std::io::Result<String> {
    let mut socket = connect(host);
    socket.write_all(question.as_bytes())?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}

fn refused(address: SocketAddr) {
    let error = TcpStream::connect(address).expect_err("it is not published any more");
    assert_eq!(error.kind(), Io::ConnectionRefused);
}

fn taken(error: &Error, by: &str) {
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.to_string().contains(by), "{error}");
    assert!(error.hint_text().is_some(), "{error}");
}

/// A port that is free at this moment, asked for by its number.
fn free_port() -> PublishedPort {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let number = listener.local_addr().expect("bound").port();
    port(&format!("{number}:7"))
}

#[tokio::test]
async fn a_port_leads_into_the_guest_as_long_as_it_runs() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let engine = home.engine();
    let mut spec = spec("a");
    spec.ports = vec![port("0:7"), port("0:9"), port("0:7/udp")];
    let made = engine.create(&spec).expect("created").ports;
    assert_eq!(made.len(), 3);
    let find = |wanted: &str| {
        let wanted = port(wanted);
        let same = |port: &&PublishedPort| {
            port.guest == wanted.guest && port.host.protocol == wanted.host.protocol
        };
        made.iter().find(same).expect("made").host
    };
    let (echo, nobody, datagrams) = (find("7"), find("9"), find("7/udp"));
    refused(echo.socket_address());
    engine.start("a").await.expect("started");
    assert_eq!(ask(&echo, "hello").expect("an answer"), "hello");
    let error = ask(&nobody, "hello").expect_err("nobody listens in the guest");
    assert_eq!(error.kind(), Io::ConnectionReset);

    let clients = [(); 2].map(|()| {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        client.connect(datagrams.socket_address()).expect("a way");
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        client
    });
    let mut buffer = [0; 64];
    for (number, client) in clients.iter().enumerate() {
        for word in ["", "one", "two"] {
            let word = format!("{word}{number}");
            client.send(word.as_bytes()).expect("sent");
            let length = client.recv(&mut buffer).expect("an answer");
            assert_eq!(&buffer[..length], word.as_bytes(), "its own answers only");
        }
    }

    let mut open = connect(&echo);
    engine.stop("a", Duration::from_secs(5)).await.expect("off");
    assert_ne!(
        open.read(&mut [0]).ok(),
        Some(1),
        "it ends with the sandbox"
    );
    refused(echo.socket_address());
    engine.start("a").await.expect("started again");
    assert_eq!(ports(&engine, "a"), made, "they are what they were");
    assert_eq!(ask(&echo, "again").expect("an answer"), "again");
    engine.delete("a").await.expect("deleted");
    refused(echo.socket_address());
    home.assert_clean("after ports");
}

#[tokio::test]
async fn ports_are_opened_and_closed_while_it_runs() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    let first = engine.publish("a", &port("0:7")).await.expect("published");
    assert_eq!(ask(&first.host, "hello").expect("an answer"), "hello");
    let again = engine.publish("a", &first).await.expect_err("its own");
    taken(&again, "sandbox `a`");

    // What is open ends with the port; and nothing else does.
    let mut open = connect(&first.host);
    open.write_all(b"x").expect("open");
    open.read_exact(&mut [0]).expect("given back");
    engine.unpublish("a", &first.host).await.expect("closed");
    let error = open.read(&mut [0]).expect_err("it was cut");
    assert_eq!(error.kind(), Io::ConnectionReset);
    refused(first.host.socket_address());
    assert_eq!(ports(&engine, "a"), []);
    let error = engine.unpublish("a", &first.host).await.expect_err("gone");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(output(&session, &["still"]).await.expect("here"), "still");

    // As well when it is off, and from the next start on.
    engine.stop("a", Duration::from_secs(5)).await.expect("off");
    let second = engine.publish("a", &first).await.expect("free again");
    let third = engine.publish("a", &port("0:7")).await.expect("chosen");
    assert_ne!(second.host.port, third.host.port);
    engine.unpublish("a", &third.host).await.expect("closed");
    engine.start("a").await.expect("started");
    assert_eq!(ports(&engine, "a"), [second]);
    assert_eq!(ask(&second.host, "more").expect("an answer"), "more");
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after ports");
}

#[tokio::test]
async fn a_port_that_is_taken_is_known_before_anything_is_made() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let engine = home.engine();
    let wish = |name: &str, port: PublishedPort| {
        let mut spec = spec(name);
        spec.ports = vec![port];
        spec
    };
    let mine = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let number = mine.local_addr().expect("bound").port();
    let error = engine.create(&wish("a", port(&format!("{number}:7"))));
    taken(&error.expect_err("taken"), "another program");
    home.assert_clean("nothing was made");

    let wanted = free_port();
    engine.create(&wish("a", wanted)).expect("free");
    let error = engine.create(&wish("b", wanted));
    taken(
        &error.expect_err("promised to one that is off"),
        "sandbox `a`",
    );
    engine.start("a").await.expect("started");
    let error = engine.create(&wish("b", wanted));
    taken(&error.expect_err("taken"), "sandbox `a`");
    engine.create(&spec("b")).expect("another one");
    let error = engine.publish("b", &wanted).await.expect_err("taken");
    taken(&error, "sandbox `a`");

    // Somebody else took it while it was off: the start says so, and can be tried again.
    engine.stop("a", Duration::from_secs(5)).await.expect("off");
    let other = TcpListener::bind(wanted.host.socket_address()).expect("free");
    let error = engine.start("a").await.expect_err("taken");
    taken(&error, "another program");
    drop(other);
    engine.start("a").await.expect("free again");
    for name in ["a", "b"] {
        engine.delete(name).await.expect("deleted");
    }
    home.assert_clean("after ports");
}

#[tokio::test]
async fn a_keeper_that_dies_gives_its_ports_back() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let engine = home.engine();
    let mut ephemeral = spec("a");
    ephemeral.ports = vec![free_port()];
    ephemeral.ephemeral = true;
    engine.create(&ephemeral).expect("created");
    engine.start("a").await.expect("started");
    let host = ephemeral.ports[0].host;
    let store = Store::open(&home.layout().database()).expect("the store");
    let row = store.sandbox_named("a").expect("read").expect("there");
    let keeper = row.holder.expect("its keeper");
    keeper.kill_and_wait(PATIENCE).expect("gone");
    refused(host.socket_address());
    // Its row is repaired by whoever wants the port.
    let mut next = spec("b");
    next.ports.clone_from(&ephemeral.ports);
    engine.create(&next).expect("free");
    assert!(store.sandbox_named("a").expect("read").is_none());
    engine.start("b").await.expect("started");
    assert_eq!(ask(&host, "hello").expect("an answer"), "hello");
    engine.delete("b").await.expect("deleted");
    home.assert_clean("after ports");
}

#[tokio::test]
async fn a_copy_has_no_ports() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let engine = home.engine();
    let mut source = spec("a");
    source.ports = vec![port("0:7")];
    let host = engine.create(&source).expect("created").ports[0].host;
    engine.start("a").await.expect("started");
    let mut open = connect(&host);
    let fork = engine.fork("a", 1, None).await.expect("a copy");
    for child in fork.children {
        child.result.expect("it runs");
        assert_eq!(ports(&engine, child.name.as_str()), []);
        engine.delete(child.name.as_str()).await.expect("deleted");
    }
    // What was open before goes on.
    open.write_all(b"x").expect("open");
    open.read_exact(&mut [0]).expect("given back");
    // And what comes while it stands still is served when it moves again.
    engine.pause("a").await.expect("paused");
    let mut waiting = connect(&host);
    waiting.write_all(b"y").expect("taken");
    let port = engine.publish("a", &port("0:7")).await.expect("published");
    engine.resume("a").await.expect("resumed");
    waiting.read_exact(&mut [0]).expect("given back");
    assert_eq!(ask(&port.host, "new").expect("an answer"), "new");
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after copies");
}

#[tokio::test]
async fn a_member_of_a_pool_takes_ports_when_it_is_claimed() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let engine = home.engine();
    let wish = |ports: &[PublishedPort]| {
        let mut spec = spec("a");
        spec.ports = ports.to_vec();
        spec
    };
    let like = spec("a");
    let mut pool = smolvm_engine::PoolSpec {
        image: like.image,
        cpus: like.cpus,
        memory_mib: like.memory_mib,
        disk_mib: like.disk_mib,
        disk_mode: like.disk_mode,
        nic: false,
        size: 1,
        commands: Vec::new(),
    };
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    let mine = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let number = mine.local_addr().expect("bound").port();
    let error = engine.claim(&wish(&[port(&format!("{number}:7"))])).await;
    taken(&error.expect_err("taken"), "another program");
    let claimed = engine.claim(&wish(&[port("0:7")])).await.expect("claimed");
    assert!(claimed.is_some(), "the refusal used no member up");
    let host = ports(&engine, "a")[0].host;
    assert_eq!(ask(&host, "hello").expect("an answer"), "hello");
    engine.delete("a").await.expect("deleted");
    refused(host.socket_address());
    pool.size = 0;
    engine.set_pool(&pool, &mut |_| {}).await.expect("no pool");
    home.assert_clean("after a pool");
}

#[tokio::test]
async fn sixteen_at_once_get_sixteen_ports() {
    let _alone = ALONE.lock().await;
    let home = Home::new();
    let names: Vec<String> = (0..16).map(|number| format!("box-{number}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            // An engine of its own, as another process would have.
            let engine = home.engine();
            scope.spawn(move || {
                let mut spec = spec(name);
                spec.ports = vec![port("0:7"), port("0:7/udp")];
                engine.create(&spec).expect("created")
            });
        }
    });
    let engine = home.engine();
    let seen: BTreeSet<HostPort> = names
        .iter()
        .flat_map(|name| ports(&engine, name))
        .map(|port| port.host)
        .collect();
    assert_eq!(seen.len(), 32);
    for name in &names {
        engine.delete(name).await.expect("deleted");
    }
    home.assert_clean("after sixteen");
}
