//! `smolvm logs`: what a guest's kernel and agent wrote to the console.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::mem::MaybeUninit;
use std::path::Path;

use clap_complete::engine::ArgValueCandidates;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use serde_json::json;
use smolvm_engine::{Engine, State};

use super::{Context, Outcome};
use crate::output;
use crate::report::CliError;
use crate::{complete, prepare};

/// Arguments of `logs`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm logs box --tail 50 --follow")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Only this many last lines
    #[arg(long, value_name = "LINES", default_value_t = 200)]
    tail: usize,
    /// Go on with new lines until the sandbox stops
    #[arg(short, long)]
    follow: bool,
}

/// Shows the console.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    if args.follow && cx.out.json {
        return Err(CliError::usage(
            "--follow and --json cannot be used together: one object has an end",
            "leave one of them out",
        ));
    }
    let engine = cx.engine(None)?;
    let warnings: Vec<_> = prepare::trouble(&engine, &args.name).into_iter().collect();
    if args.follow {
        prepare::warn(cx, &warnings);
        follow(&engine, args)?;
        return Ok(Outcome::default());
    }
    let console = engine.console(&args.name, args.tail)?;
    for line in &console.lines {
        cx.out.line(line)?;
    }
    prepare::warn(cx, &warnings);
    let data = json!({ "path": console.path, "lines": console.lines, "warnings": warnings });
    Ok(data.into())
}

/// Writes the tail, then whatever is added, until nothing more can come.
fn follow(engine: &Engine, args: &Args) -> Result<(), CliError> {
    let console = engine.console(&args.name, args.tail)?;
    let path = console.path.as_path();
    let failed = |error| CliError::io(format!("following {}", path.display()), error);
    // Watch before reading, so that nothing is added unseen in between.
    let changes = Changes::watch(path).map_err(failed)?;
    let keeper = engine.keeper_end(&args.name)?;
    let mut file = File::open(path).map_err(failed)?;
    let mut text = tail_start(&mut file, args.tail).map_err(failed)?;
    loop {
        // Asked before reading: what a sandbox wrote before it ended is then read for certain.
        let more = running(engine, &args.name);
        io::copy(&mut file, &mut text).map_err(failed)?;
        output::stdout_bytes(&text)
            .map_err(|error| CliError::io("writing to standard output", error))?;
        text.clear();
        if !more {
            return Ok(());
        }
        changes.wait(keeper.as_ref()).map_err(failed)?;
    }
}

fn running(engine: &Engine, name: &str) -> bool {
    engine.info(name).is_ok_and(|info| match info.state {
        State::Starting | State::Running | State::Paused | State::Stopping => true,
        State::Created | State::Stopped | State::Error | State::Deleting => false,
    })
}

/// Reads the whole file and keeps its last lines. The keeper bounds the file, so it fits.
fn tail_start(file: &mut File, lines: usize) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(0))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let start = last_lines(&text, lines);
    Ok(text.split_off(start))
}

/// Where the last `lines` lines of a text begin. An unfinished line counts.
fn last_lines(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut breaks = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    breaks.nth(lines - 1).map_or(0, |(at, _)| at + 1)
}

/// A watch on one file.
struct Changes(rustix::fd::OwnedFd);

impl Changes {
    fn watch(path: &Path) -> io::Result<Self> {
        use inotify::WatchFlags as W;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        // CLOSE_WRITE is its keeper's end; ATTRIB tells of an unlink while we hold the file open.
        let what = W::MODIFY | W::CLOSE_WRITE | W::ATTRIB | W::DELETE_SELF | W::MOVE_SELF;
        inotify::add_watch(&watch, path, what)?;
        Ok(Self(watch))
    }

    /// Waits until something happened to the file, or its keeper ended: that records the end of the
    /// sandbox only after it has closed the file.
    fn wait(&self, keeper: Option<&rustix::fd::OwnedFd>) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.0, PollFlags::IN)];
        fds.extend(keeper.map(|keeper| PollFd::new(keeper, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        if !fds[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        loop {
            match reader.next() {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_text() {
        let last = |text: &'static str, lines| &text[last_lines(text.as_bytes(), lines)..];
        assert_eq!(last("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(last("a\nb\nc", 2), "b\nc");
        assert_eq!(last("a\nb\n", 5), "a\nb\n");
        assert_eq!(last("a\nb\n", 0), "");
        assert_eq!(last("", 3), "");
        assert_eq!(last("\n\n", 1), "\n");
    }
}
