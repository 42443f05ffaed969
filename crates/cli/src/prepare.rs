//! Making sure that the kernel and an image are there, before a sandbox needs them.

use serde_json::{Value, json};
use smolvm_engine::{Cancel, Engine, ErrorKind, KernelChoice, PullPolicy};

use crate::commands::Context;
use crate::output;
use crate::progress::Meter;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// What long work gives: its own result, and how long each phase took.
pub(crate) type Timed = Vec<(String, std::time::Duration)>;

/// The phases of long work, for programs.
pub(crate) fn phases(timed: &Timed) -> Value {
    let phases = timed.iter();
    phases
        .map(|(phase, time)| json!({ "name": phase, "ms": units::millis(*time) }))
        .collect()
}

/// Does long blocking work under a progress meter. The first signal cancels it, so that it cleans
/// up after itself; a second one leaves it where it is.
///
/// # Errors
///
/// [`CliError::Interrupted`], or what the work failed with.
pub(crate) async fn long(
    cx: &Context,
    signals: &mut Signals,
    work: impl FnOnce(&mut Meter, &Cancel) -> smolvm_engine::Result<()> + Send + 'static,
) -> Result<Timed, CliError> {
    let cancel = Cancel::new().map_err(smolvm_engine::Error::from)?;
    let mut meter = Meter::new(cx.out, cx.world.stderr_terminal);
    let mut running = {
        let cancel = cancel.clone();
        tokio::task::spawn_blocking(move || {
            let result = work(&mut meter, &cancel);
            (result, meter.finish())
        })
    };
    loop {
        tokio::select! {
            done = &mut running => {
                let (result, phases) = done.map_err(|error| {
                    CliError::io("preparing this host", std::io::Error::other(error))
                })?;
                return match result {
                    Err(error) if error.kind() == ErrorKind::Cancelled => Err(CliError::Interrupted),
                    Err(error) => Err(error.into()),
                    // It was done before it noticed; what it made is whole.
                    Ok(()) if cancel.is_cancelled() => Err(CliError::Interrupted),
                    Ok(()) => Ok(phases),
                };
            }
            _ = signals.next() => {
                if cancel.is_cancelled() {
                    return Err(CliError::Interrupted);
                }
                cancel.cancel();
            }
        }
    }
}

/// Pulls `image`, if the policy says so.
///
/// # Errors
///
/// As [`long`].
pub(crate) async fn pull(
    cx: &Context,
    engine: &Engine,
    signals: &mut Signals,
    image: &str,
    policy: PullPolicy,
) -> Result<(), CliError> {
    if !engine.needs_pull(image, policy)? {
        return Ok(());
    }
    let (engine, image) = (engine.clone(), image.to_owned());
    long(cx, signals, move |meter, cancel| {
        engine.require_image(&image, policy, meter, cancel)
    })
    .await
    .map(drop)
}

/// Makes `image` and the kernel ready, if they are not, for sandboxes with a network or without.
///
/// # Errors
///
/// As [`long`].
pub(crate) async fn image(
    cx: &Context,
    engine: &Engine,
    signals: &mut Signals,
    image: &str,
    kernel: &KernelChoice,
    network: bool,
) -> Result<Timed, CliError> {
    let missing = engine.missing_assets(image, kernel, network)?;
    if missing.is_empty() && !matches!(kernel, KernelChoice::File(_)) {
        return Ok(Timed::new());
    }
    if !missing.is_empty() {
        // Before anything is downloaded that could not be used, or kept.
        engine.make_data_dir()?;
        programs(engine, &missing)?;
        cx.out
            .status(&format!("preparing {}, once", missing.join(" and ")));
    }
    let (engine, image, kernel) = (engine.clone(), image.to_owned(), kernel.clone());
    long(cx, signals, move |meter, cancel| {
        engine.prepare(&image, &kernel, meter, cancel)
    })
    .await
}

/// Refuses a host that lacks programs.
fn programs(engine: &Engine, assets: &[String]) -> Result<(), CliError> {
    let missing = engine.missing_packages_for(assets);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing
        .iter()
        .map(|missing| format!("`{}`", missing.program))
        .collect();
    let mut packages: Vec<_> = missing.iter().map(|missing| &*missing.package).collect();
    packages.sort_unstable();
    packages.dedup();
    Err(CliError::Missing {
        message: format!("this host has no {}", names.join(", ")),
        hint: format!("as root: apt-get install {}", packages.join(" ")),
    })
}

/// Tells a person what the engine wants the caller to know, one line for each.
pub(crate) fn warn(cx: &Context, warnings: &[String]) {
    for warning in warnings {
        // A reason may quote a guest's console; it must not drive the terminal.
        let text = warning.replace(char::is_control, " ");
        cx.out.status(&format!("warning: {text}"));
    }
}

/// What is wrong with a sandbox, or with the disk that its files are on: it may be why something in it
/// failed.
pub(crate) fn trouble(engine: &Engine, name: &str) -> Option<String> {
    let reason = engine.info(name).ok()?.reason;
    told(name, reason).or_else(|| {
        let data = engine.config().data_dir.display();
        let full =
            format!("the disk of {data} is full, and so sandbox `{name}` cannot write to its own");
        engine.is_disk_full().then_some(full)
    })
}

/// What is wrong with a sandbox, as a warning.
pub(crate) fn told(name: &str, trouble: Option<String>) -> Option<String> {
    Some(format!("sandbox `{name}`: {}", trouble?))
}

/// Says that guests are emulated, and why; an emulated guest is slow enough to be asked about.
pub(crate) fn note_emulation(cx: &Context, engine: &Engine) {
    if cx.out.quiet || cx.out.json || !(cx.world.stderr_terminal || cx.verbose) {
        return;
    }
    if let Ok(acceleration) = engine.acceleration()
        && !acceleration.kvm
    {
        output::stderr(&format!(
            "note: guests are emulated, which is slow: {}",
            in_short(&acceleration.reason)
        ));
    }
}

/// The first clause of a reason; `smolvm doctor` shows all of it.
pub(crate) fn in_short(reason: &str) -> &str {
    reason.split([';', '(']).next().unwrap_or(reason).trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_cut_at_their_first_clause() {
        assert_eq!(
            in_short("it ended with X at `y` (suberror 1, data [1]); z"),
            "it ended with X at `y`"
        );
        assert_eq!(in_short("no /dev/kvm"), "no /dev/kvm");
    }
}
