//! Completion of command lines, with the names of the sandboxes that exist.

use clap::CommandFactory as _;
use clap_complete::CompleteEnv;
use clap_complete::engine::CompletionCandidate;
use smolvm_engine::Engine;

use crate::args::{Accel, Cli, EngineArg, Globals};
use crate::world::{COMPLETE_VARIABLE, World};

/// Answers the shell; false if it did not ask after all.
pub(crate) fn answer() -> bool {
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(Cli::command)
        .var(COMPLETE_VARIABLE)
        .try_complete(std::env::args_os(), here.as_deref())
        // A shell that waits for candidates can do nothing with an error.
        .unwrap_or(true)
}

/// The sandboxes, as candidates.
pub(crate) fn sandboxes() -> Vec<CompletionCandidate> {
    let sandboxes = engine().and_then(|engine| engine.list().ok());
    sandboxes
        .unwrap_or_default()
        .into_iter()
        .map(|sandbox| {
            CompletionCandidate::new(sandbox.name.as_str())
                .help(Some(sandbox.state.as_str().to_owned().into()))
        })
        .collect()
}

/// The snapshots, as candidates.
pub(crate) fn snapshots() -> Vec<CompletionCandidate> {
    let snapshots = engine().and_then(|engine| engine.snapshots().ok());
    snapshots
        .unwrap_or_default()
        .into_iter()
        .map(|snapshot| {
            let of = format!("of {}", snapshot.sandbox);
            CompletionCandidate::new(snapshot.name).help(Some(of.into()))
        })
        .collect()
}

/// The volumes, as candidates.
pub(crate) fn volumes() -> Vec<CompletionCandidate> {
    let volumes = engine().and_then(|engine| engine.volumes().ok());
    volumes
        .unwrap_or_default()
        .into_iter()
        .map(|volume| {
            let users = volume.users.len();
            CompletionCandidate::new(volume.name.as_str())
                .help(Some(format!("of {users} sandboxes").into()))
        })
        .collect()
}

/// The ports that lead to any sandbox, as candidates.
pub(crate) fn ports() -> Vec<CompletionCandidate> {
    let sandboxes = engine().and_then(|engine| engine.list().ok());
    sandboxes
        .unwrap_or_default()
        .into_iter()
        .flat_map(|sandbox| {
            let of = format!("of {}", sandbox.name);
            sandbox.ports.into_iter().map(move |port| {
                CompletionCandidate::new(port.host.to_string()).help(Some(of.clone().into()))
            })
        })
        .collect()
}

/// The images, as candidates.
pub(crate) fn images() -> Vec<CompletionCandidate> {
    let images = engine().and_then(|engine| engine.images().ok());
    images
        .unwrap_or_default()
        .into_iter()
        .map(|image| CompletionCandidate::new(image.name).help(Some(image.source.into())))
        .collect()
}

/// The templates, as candidates.
pub(crate) fn templates() -> Vec<CompletionCandidate> {
    let templates = engine().and_then(|engine| engine.templates().ok());
    templates
        .unwrap_or_default()
        .into_iter()
        .map(|template| {
            let state = template.stale.unwrap_or_else(|| "current".to_owned());
            CompletionCandidate::new(template.id).help(Some(state.into()))
        })
        .collect()
}

/// The engine as the environment alone wants it.
fn engine() -> Option<Engine> {
    let globals = Globals {
        json: false,
        data_dir: None,
        accel: Accel::Auto,
        engine: EngineArg::Auto,
        quiet: true,
        verbose: 0,
    };
    World::read().config(&globals, None).ok().map(Engine::new)
}
