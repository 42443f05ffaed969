//! Enters a network of this user's own and says what it reaches: for the tests of `net::user`, which
//! need a process with one thread.
//!
//! Arguments: the program `pasta`, then `ADDRESS:PORT` to connect to, any number of them. For each, one
//! line: what was said there, or why not.

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use smolvm_host::Os;
use smolvm_host::net::user::{Uplink, enter};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let pasta = PathBuf::from(arguments.next().ok_or("which pasta?")?);
    let os = Os::new();
    let host = enter(&os)?;
    let uplink = Uplink::start(&os, &pasta, &host)?;
    let mut out = std::io::stdout().lock();
    for to in arguments {
        let to: SocketAddr = to.parse()?;
        let said =
            TcpStream::connect_timeout(&to, Duration::from_secs(20)).and_then(|mut stream| {
                let mut said = String::new();
                stream.read_to_string(&mut said)?;
                Ok(said)
            });
        match said {
            Ok(said) => writeln!(out, "{to}: {said}")?,
            Err(error) => writeln!(out, "{to}: {}", error.kind())?,
        }
    }
    // A socket opened on the host's side is the host's: whoever started this program reaches it.
    let listener = host.run(|| TcpListener::bind("127.0.0.1:0"))?;
    writeln!(out, "listening on {}", listener.local_addr()?)?;
    out.flush()?;
    let (mut caller, _) = listener.accept()?;
    caller.write_all(b"hello")?;
    // Until standard input ends, so that a test can look, and kill.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(uplink);
    Ok(())
}
