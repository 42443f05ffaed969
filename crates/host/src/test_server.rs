//! An HTTP server for tests: it does what a test tells it to.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A request: its path with the query, and its headers, names in lower case.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Asked {
    pub(crate) fn first_byte(&self) -> usize {
        let range = self.headers.get("range").map(String::as_str);
        range
            .and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse()
                    .ok()
            })
            .unwrap_or(0)
    }
}

/// What is answered.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Bytes of the body that are sent before the connection is closed.
    pub(crate) cut: Option<usize>,
    /// Whether it is left open and silent then.
    pub(crate) hang: bool,
}

pub(crate) fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body: body.into(),
        cut: None,
        hang: false,
    }
}

impl Answer {
    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn cut(mut self, at: usize) -> Self {
        self.cut = Some(at);
        self
    }
}

type Behaviour = dyn Fn(&Asked, usize) -> Answer + Send + Sync;

/// Serves until the test ends. The behaviour is told how often that path was asked for before.
pub(crate) struct Server {
    pub(crate) port: u16,
    pub(crate) log: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    pub(crate) fn new(behaviour: impl Fn(&Asked, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (behaviour, seen): (Arc<Behaviour>, _) = (Arc::new(behaviour), Arc::clone(&log));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (behaviour, seen) = (Arc::clone(&behaviour), Arc::clone(&seen));
                std::thread::spawn(move || serve(stream, &*behaviour, &seen));
            }
        });
        Self { port, log }
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Requests for paths that contain this.
    pub(crate) fn asked(&self, part: &str) -> Vec<Asked> {
        let log = self.log.lock().unwrap();
        log.iter()
            .filter(|asked| asked.path.contains(part))
            .cloned()
            .collect()
    }
}

fn serve(stream: TcpStream, behaviour: &Behaviour, seen: &Mutex<Vec<Asked>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let length = headers
        .get("content-length")
        .and_then(|text| text.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let asked = Asked {
        method,
        path,
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    let before = {
        let mut log = seen.lock().unwrap();
        let before = log.iter().filter(|one| one.path == asked.path).count();
        log.push(asked.clone());
        before
    };
    let answer = behaviour(&asked, before);
    let mut stream = stream;
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
    head += &format!("content-length: {}\r\n", answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    let sent = answer.cut.unwrap_or(answer.body.len());
    stream.write_all(&answer.body[..sent]).ok()?;
    if answer.hang {
        // Until the other side has had enough.
        let _ = reader.read(&mut [0]);
    }
    Some(())
}
