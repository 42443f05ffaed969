//! Firecracker's API: HTTP/1.1 over its Unix socket, one connection for each request.
//!
//! The requests are those of the project's published description
//! (`src/firecracker/swagger/firecracker.yaml`); only what is used here is written down. A connection
//! costs some 50 us, and one that was given up half-way takes nothing of the next request with it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::run::Directory;
use crate::sys;

/// The socket's name in the machine's directory.
pub(super) const SOCKET: &str = "api.sock";

/// Longest answer. The longest that is expected says what is wrong with a request.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Most headers of an answer.
const HEADERS_MAX: usize = 16;

/// Most time between looks while the socket has a name and nobody listens at it yet: two system calls of
/// the VMM's lie between, bind(2) and listen(2), and nothing tells of the second.
const ALMOST: Duration = Duration::from_millis(1);

/// What goes wrong in a conversation.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// The VMM closed the connection, or is not there.
    #[error("it closed its control socket")]
    Closed,
    /// No answer in time.
    #[error("it did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// It will not do that.
    #[error("it refused with status {status}: {why}")]
    Refused { status: u16, why: String },
    /// It answered what is not HTTP.
    #[error("it answered what is no HTTP: {0}")]
    Garbage(String),
    /// The host's kernel refused.
    #[error("{0}")]
    Host(io::Error),
}

/// A change of the machine's.
#[derive(Debug, Serialize)]
#[serde(tag = "state")]
pub(super) enum VmState {
    Paused,
    Resumed,
}

#[derive(Debug, Serialize)]
pub(super) struct CreateSnapshot {
    pub(super) snapshot_type: &'static str,
    pub(super) snapshot_path: PathBuf,
    pub(super) mem_file_path: PathBuf,
}

#[derive(Debug, Serialize)]
pub(super) struct LoadSnapshot {
    pub(super) snapshot_path: PathBuf,
    pub(super) mem_backend: MemoryBackend,
    pub(super) resume_vm: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) network_overrides: Vec<NetworkOverride>,
}

#[derive(Debug, Serialize)]
pub(super) struct MemoryBackend {
    pub(super) backend_type: &'static str,
    pub(super) backend_path: PathBuf,
}

#[derive(Debug, Serialize)]
pub(super) struct NetworkOverride {
    pub(super) iface_id: &'static str,
    pub(super) host_dev_name: String,
}

impl NetworkOverride {
    /// The machine's one network device is connected to this device of the host.
    pub(super) fn to(host_dev_name: String) -> Self {
        Self {
            iface_id: super::config::NIC,
            host_dev_name,
        }
    }
}

/// How a refusal is told.
#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// The way to the API of one VMM.
#[derive(Debug)]
pub(super) struct Api {
    /// Its socket, by a path short enough for a socket's address.
    socket: PathBuf,
    /// Tells of names that appear in the directory of the socket.
    names: AsyncFd<OwnedFd>,
}

impl Api {
    /// To be made before the VMM is started, so that its socket is not missed.
    pub(super) fn new(directory: &Directory) -> io::Result<Api> {
        let names = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&names, directory.path(), WatchFlags::CREATE)?;
        Ok(Api {
            socket: directory.short(SOCKET),
            names: sys::watch_readable(names)?,
        })
    }

    /// Sends a request, with a body unless it is a GET, and waits for its answer, for `limit` at most.
    pub(super) async fn request(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        let body = match method {
            "GET" => Vec::new(),
            _ => serde_json::to_vec(body).map_err(|error| ApiError::Host(error.into()))?,
        };
        let talk = async {
            let mut stream = self.connect().await?;
            let mut head = format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
            );
            if !body.is_empty() {
                head.push_str("Content-Type: application/json\r\n");
                head.push_str(&format!("Content-Length: {}\r\n", body.len()));
            }
            head.push_str("\r\n");
            let request = [head.as_bytes(), &body].concat();
            stream.write_all(&request).await.map_err(broken)?;
            answer(&mut stream).await
        };
        tokio::time::timeout(limit, talk)
            .await
            .unwrap_or(Err(ApiError::Timeout(limit)))
    }

    /// Connects as soon as somebody listens.
    async fn connect(&self) -> Result<UnixStream, ApiError> {
        loop {
            match connect_to(&self.socket).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.wait_for_name().await.map_err(ApiError::Host)?;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    let _ = tokio::time::timeout(ALMOST, self.wait_for_name()).await;
                }
                Err(error) => return Err(ApiError::Host(error)),
            }
        }
    }

    /// Waits until something new is in the directory.
    async fn wait_for_name(&self) -> io::Result<()> {
        let mut ready = self.names.readable().await?;
        let mut events = [0; 4096];
        while matches!(rustix::io::read(ready.get_inner(), &mut events), Ok(1..)) {}
        ready.clear_ready();
        Ok(())
    }
}

/// Connects to the socket with this name, and to nothing that its name has come to lead to: the directory
/// is the VMM's own, who may have put something else there.
async fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode);
    if kind != FileType::Socket {
        return Err(io::Error::other("its control socket is no socket"));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

/// Reads one answer: its head, and as much behind it as the head says.
async fn answer(stream: &mut UnixStream) -> Result<(), ApiError> {
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = parse(&bytes)? {
            return answer;
        }
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(ApiError::Garbage("it does not end".to_owned()));
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await {
            Ok(0) => return Err(ApiError::Closed),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) => return Err(broken(error)),
        }
    }
}

/// The answer, if all of it is there. Pure.
fn parse(bytes: &[u8]) -> Result<Option<Result<(), ApiError>>, ApiError> {
    let garbage = |why: String| ApiError::Garbage(why);
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(garbage(error.to_string())),
    };
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .map(|header| {
            std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.trim().parse::<usize>().ok())
                .filter(|length| *length <= ANSWER_BYTES_MAX)
                .ok_or_else(|| garbage("its length makes no sense".to_owned()))
        })
        .transpose()?
        .unwrap_or(0);
    let Some(body) = bytes.get(head..head + length) else {
        return Ok(None);
    };
    let status = response.code.unwrap_or(0);
    // 1xx announces another answer, which is not asked for here.
    if (200..300).contains(&status) {
        return Ok(Some(Ok(())));
    }
    let why = serde_json::from_slice::<Fault>(body).map_or_else(
        |_| String::from_utf8_lossy(body).trim().to_owned(),
        |fault| fault.fault_message,
    );
    Ok(Some(Err(ApiError::Refused { status, why })))
}

/// Of a connection that broke, it does not matter how.
fn broken(error: io::Error) -> ApiError {
    match error.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::UnexpectedEof => ApiError::Closed,
        _ => ApiError::Host(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Option<Result<(), String>>, String> {
        parse(text.as_bytes())
            .map(|found| found.map(|answer| answer.map_err(|error| error.to_string())))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_answer_is_taken_when_all_of_it_is_there() {
        let done = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        for cut in 0..done.len() {
            assert_eq!(parsed(&done[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(parsed(done), Ok(Some(Ok(()))));

        let body = r#"{"fault_message":"no such file"}"#;
        let refused = format!(
            "HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        for cut in 0..refused.len() {
            assert_eq!(parsed(&refused[..cut]), Ok(None), "{cut}");
        }
        let why = "it refused with status 400: no such file".to_owned();
        assert_eq!(parsed(&refused), Ok(Some(Err(why))));
    }

    #[test]
    fn what_is_no_answer_is_told_from_half_of_one() {
        for text in [
            "garbage\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        ] {
            let error = parsed(text).expect_err(text);
            assert!(error.starts_with("it answered what is no HTTP"), "{error}");
        }
        let plain = "HTTP/1.1 500 \r\nContent-Length: 5\r\n\r\noops ";
        let why = "it refused with status 500: oops".to_owned();
        assert_eq!(parsed(plain), Ok(Some(Err(why))));
    }

    #[test]
    fn requests_are_what_the_description_asks_for() {
        let json = |value: &dyn erased::Json| value.json();
        assert_eq!(json(&VmState::Paused), r#"{"state":"Paused"}"#);
        assert_eq!(json(&VmState::Resumed), r#"{"state":"Resumed"}"#);
        let load = LoadSnapshot {
            snapshot_path: "s".into(),
            mem_backend: MemoryBackend {
                backend_type: "File",
                backend_path: "m".into(),
            },
            resume_vm: true,
            network_overrides: Vec::new(),
        };
        assert_eq!(
            json(&load),
            r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"},"resume_vm":true}"#
        );
    }

    mod erased {
        pub(super) trait Json {
            fn json(&self) -> String;
        }

        impl<T: serde::Serialize> Json for T {
            fn json(&self) -> String {
                serde_json::to_string(self).expect("json")
            }
        }
    }
}
