//! `smolvm doctor`: can this host run sandboxes, and if not, what helps.

use serde_json::json;
use smolvm_engine::{AccelChoice, CheckStatus, EngineChoice};

use super::{Context, Outcome};
use crate::report::CliError;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm doctor --strict")]
pub(crate) struct Args {
    /// Fail on warnings too
    #[arg(long)]
    strict: bool,
}

/// Checks the host.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let checks = engine.doctor();
    for check in &checks {
        cx.out.line(&format!(
            "{:<4}  {}: {}",
            status(check.status),
            check.name,
            check.detail
        ))?;
        if let Some(fix) = &check.fix {
            cx.out.line(&format!("      fix: {fix}"))?;
        }
    }
    let count = |wanted| checks.iter().filter(|check| check.status == wanted).count();
    let (pass, warn, fail) = (
        count(CheckStatus::Pass),
        count(CheckStatus::Warn),
        count(CheckStatus::Fail),
    );
    cx.out
        .status(&format!("{pass} passed, {warn} warned, {fail} failed"));
    let bad = fail + if args.strict { warn } else { 0 };
    let acceleration = engine.acceleration().ok();
    let chosen = engine.engine().ok();
    let uname = rustix::system::uname();
    Ok(Outcome {
        data: json!({
            "backend_requested": match engine.config().engine {
                EngineChoice::Auto => "auto",
                EngineChoice::Qemu => "qemu",
                EngineChoice::Firecracker => "firecracker",
            },
            "backend_resolved": chosen.as_ref().map(|found| found.name.as_str()),
            "backend_reason": chosen.as_ref().map(|found| &found.reason),
            "accel_requested": match engine.config().accel {
                AccelChoice::Auto => "auto",
                AccelChoice::Kvm => "kvm",
                AccelChoice::Emulation => "emulation",
            },
            "accel_resolved": acceleration
                .as_ref()
                .map(|found| if found.kvm { "kvm" } else { "emulation" }),
            "accel_reason": acceleration.as_ref().map(|found| &found.reason),
            "system": uname.sysname().to_string_lossy(),
            "arch": uname.machine().to_string_lossy(),
            "checks": checks
                .iter()
                .map(|check| json!({
                    "name": check.name,
                    "status": status(check.status),
                    "detail": check.detail,
                    "fix": check.fix,
                }))
                .collect::<Vec<_>>(),
            "summary": { "pass": pass, "warn": warn, "fail": fail },
        }),
        error: (bad > 0)
            .then(|| CliError::Partly(format!("{bad} of {} checks did not pass", checks.len()))),
    })
}

fn status(status: CheckStatus) -> &'static str {
    match status {
        CheckStatus::Pass => "pass",
        CheckStatus::Warn => "warn",
        CheckStatus::Fail => "fail",
    }
}
