//! `smolvm bench lifecycle`: what the whole life of a sandbox costs on this host.
//!
//! The numbers in the README come from here. The JSON names are those of the benchmark the product
//! has always shipped, so that files of all releases can be put side by side.

pub(crate) mod files;
mod plot;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use smolvm_engine::{
    Config, DEFAULT_IMAGE, Engine, ExecEvent, ExecSpec, KernelChoice, PoolSpec, SandboxSpec,
    Session,
};

use super::machine::kernel_choice;
use super::{Context, Outcome, block_on};
use crate::prepare;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Commands timed one after another in each sandbox; their median is one value.
const COMMANDS: usize = 20;

/// Members of the pool that is measured.
const POOL_SIZE: u32 = 2;

/// Lives at one time when it is counted how many end in a second.
const AT_ONCE: usize = 4;

/// Arguments of `bench lifecycle`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  smolvm bench lifecycle -n 10 -o result.json --plot result.svg

Three ways to a sandbox take turns, so that their ratios hold on a busy host: cold (it boots),
template (it starts from a machine booted ahead), pool (it was made ahead). For each, in
milliseconds: create; start (until its keeper and VMM are launched); ready (create until it takes
commands); first (the first `true`); answer (create until that is answered); next (the median of 20
more); python (the first `python3 -c 'print(6*7)'`); stop; delete (of a stopped one); kill (delete
of a running one); run (create, `true`, kill); total (create until deleted). memory is what its
machine has written after the first command, and shares with no other, in MiB. A template that is
not there is built before the first life, which is no part of any life: `template build`.")]
pub(crate) struct Args {
    /// Lives of each kind
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    iterations: u32,
    /// Image
    #[arg(long, default_value = DEFAULT_IMAGE)]
    image: String,
    /// Ways to a sandbox, comma-separated
    #[arg(long, value_name = "WAY", value_enum, value_delimiter = ',')]
    #[arg(default_values_t = Way::ALL)]
    ways: Vec<Way>,
    /// Kernel: small, docker, stock, or a file [default: small if it was built, else stock]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<PathBuf>,
    /// Also write the JSON of --json to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also draw the medians into this SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// How a sandbox comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Way {
    Cold,
    Template,
    Pool,
}

impl Way {
    const ALL: [Self; 3] = [Self::Cold, Self::Template, Self::Pool];

    fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Template => "template",
            Self::Pool => "pool",
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is measured: the column, and the name in JSON.
const METRICS: [(&str, &str); 13] = [
    ("create", "host_create_ms"),
    ("start", "vmm_start_ms"),
    ("ready", "total_fresh_ready_ms"),
    ("first", "first_command_ms"),
    ("answer", "first_answer_ms"),
    ("next", "next_command_ms"),
    ("python", "python_ms"),
    ("stop", "stop_ms"),
    ("delete", "delete_ms"),
    ("kill", "kill_ms"),
    ("run", "run_ms"),
    ("total", "total_ms"),
    ("memory", "private_memory_mib"),
];

/// One turn's values, in the order of [`METRICS`].
type Life = [f64; METRICS.len()];

/// Measures.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let kernel = kernel_choice(args.kernel.as_deref())?;
    let (began, clock) = (jiff::Timestamp::now(), Instant::now());
    let args = &Args {
        // Members of pools have the kernel that nobody asked for.
        ways: match kernel {
            KernelChoice::Auto => args.ways.clone(),
            _ => args
                .ways
                .iter()
                .copied()
                .filter(|way| *way != Way::Pool)
                .collect(),
        },
        ..args.clone()
    };
    let (build, (lives, per_second)) = block_on(async {
        let mut signals = Signals::install()?;
        prepare::image(cx, &engine, &mut signals, &args.image, &kernel, false).await?;
        let build = if args.ways.contains(&Way::Template) {
            build_template(args, cx, &engine, &kernel, &mut signals).await?
        } else {
            None
        };
        let lives = measure(args, cx, &engine, &kernel, &mut signals).await?;
        Ok::<_, CliError>((build, lives))
    })?;
    let mut stamp = environment(&engine);
    stamp.insert(
        "guest_kernel".to_owned(),
        json!(engine.kernel_key(&kernel)?),
    );
    let ways: Vec<(Way, Vec<Series>)> = args
        .ways
        .iter()
        .zip(lives)
        .map(|(&way, lives)| {
            let of = |metric: usize| lives.iter().map(|life| life[metric]).collect();
            (
                way,
                (0..METRICS.len()).map(|at| Series::new(of(at))).collect(),
            )
        })
        .collect();
    show(cx, &ways, build, per_second, &stamp)?;
    let mut data = data(args, &ways, stamp, began, clock.elapsed());
    data["template_build_ms"] = json!(build.map(units::millis));
    data["lives_per_second"] = json!(per_second);
    if let Some(path) = &args.output {
        write(path, &data)?;
    }
    if let Some(path) = &args.plot {
        let rows: Vec<_> = ways
            .iter()
            .map(|(way, series)| (way.name(), medians(series)))
            .collect();
        plot::write(path, &rows)?;
    }
    Ok(data.into())
}

/// The medians of what is a time.
fn medians(series: &[Series]) -> Vec<(&'static str, f64)> {
    METRICS
        .iter()
        .zip(series)
        .filter(|((_, name), _)| name.ends_with("_ms"))
        .map(|((column, _), series)| (*column, series.percentile(50)))
        .collect()
}

/// Finds the template that the lives start from, or builds it, so that none of them has to: the time
/// that took, if it was built.
async fn build_template(
    args: &Args,
    cx: &Context,
    engine: &Engine,
    kernel: &KernelChoice,
    signals: &mut Signals,
) -> Result<Option<Duration>, CliError> {
    // Measured once after each boot of the host, and no part of a build.
    engine.acceleration()?;
    let mut spec = SandboxSpec::new(engine.unused_name()?);
    spec.image.clone_from(&args.image);
    spec.kernel.clone_from(kernel);
    let engine = engine.clone();
    let (sender, receiver) = std::sync::mpsc::channel();
    prepare::long(cx, signals, move |meter, cancel| {
        let begin = Instant::now();
        let done = engine.build_template(&spec, meter, cancel)?;
        // Received below, when this has ended.
        let _ = sender.send(done.built.then(|| begin.elapsed()));
        Ok(())
    })
    .await?;
    receiver
        .recv()
        .map_err(|error| CliError::io("building the template", std::io::Error::other(error)))
}

/// The lives of each way, and how many short ones end in a second.
async fn measure(
    args: &Args,
    cx: &Context,
    engine: &Engine,
    kernel: &KernelChoice,
    signals: &mut Signals,
) -> Result<(Vec<Vec<Life>>, Option<f64>), CliError> {
    let booting = Engine::new(Config {
        templates: false,
        ..engine.config().clone()
    });
    // A kind of its own, so that it is nobody's pool but ours.
    let mut pooled = SandboxSpec::new(engine.unused_name()?);
    pooled.image.clone_from(&args.image);
    pooled.disk_mib += 1;
    let mut pool = PoolSpec {
        image: args.image.clone(),
        cpus: pooled.cpus,
        memory_mib: pooled.memory_mib,
        disk_mib: pooled.disk_mib,
        disk_mode: pooled.disk_mode,
        nic: false,
        size: POOL_SIZE,
        commands: Vec::new(),
    };
    let result = async {
        let mut lives = vec![Vec::new(); args.ways.len()];
        for turn in 1..=args.iterations {
            for (&way, lives) in args.ways.iter().zip(&mut lives) {
                let mut spec = SandboxSpec::new(engine.unused_name()?);
                spec.image.clone_from(&args.image);
                spec.kernel.clone_from(kernel);
                let engine = match way {
                    Way::Cold => &booting,
                    Way::Template => engine,
                    Way::Pool => {
                        spec.disk_mib = pooled.disk_mib;
                        engine
                    }
                };
                let fill = (way == Way::Pool).then_some(&pool);
                lives.push(turn_of(engine, &spec, fill, signals).await?);
            }
            cx.out.status(&format!("{turn} of {}", args.iterations));
        }
        let per_second = if args.ways.contains(&Way::Template) {
            let lives = usize::try_from(args.iterations)
                .unwrap_or(usize::MAX)
                .min(50)
                * AT_ONCE;
            Some(
                signals
                    .or_interrupted(throughput(engine, &args.image, kernel, lives))
                    .await?,
            )
        } else {
            None
        };
        Ok((lives, per_second))
    }
    .await;
    if args.ways.contains(&Way::Pool) {
        pool.size = 0;
        engine.set_pool(&pool, &mut |_| {}).await?;
    }
    result
}

/// A long life and a short one.
async fn turn_of(
    engine: &Engine,
    spec: &SandboxSpec,
    fill: Option<&PoolSpec>,
    signals: &mut Signals,
) -> Result<Life, CliError> {
    let work = async {
        if let Some(pool) = fill {
            // Waits for whoever fills it in the background.
            engine.set_pool(pool, &mut |_| {}).await?;
        }
        let long = long(engine, spec).await?;
        if let Some(pool) = fill {
            engine.set_pool(pool, &mut |_| {}).await?;
        }
        let short = short(engine, spec).await?;
        Ok::<_, CliError>((long, short))
    };
    let result = signals.or_interrupted(work).await;
    match result {
        Ok((long, short)) => {
            let [
                create,
                start,
                ready,
                first,
                next,
                python,
                stop,
                delete,
                total,
                memory,
            ] = long;
            let [kill, run] = short;
            Ok([
                create,
                start,
                ready,
                first,
                ready + first,
                next,
                python,
                stop,
                delete,
                kill,
                run,
                total,
                memory,
            ])
        }
        Err(error) => {
            // The failure is what matters; a failed clean-up shows in `ls`.
            let _ = signals
                .or_interrupted(engine.delete(spec.name.as_str()))
                .await;
            Err(error)
        }
    }
}

/// Milliseconds since then.
fn since(then: Instant) -> f64 {
    units::millis(then.elapsed())
}

/// Makes and starts a sandbox: milliseconds until it was made, and until its VMM ran.
async fn launch(engine: &Engine, spec: &SandboxSpec) -> Result<(Session, f64, f64), CliError> {
    let begin = Instant::now();
    if let Some((session, _)) = engine.claim(spec).await? {
        return Ok((session, 0.0, 0.0));
    }
    engine.create(spec)?;
    let create = since(begin);
    let (session, times) = engine.start(spec.name.as_str()).await?;
    Ok((session, create, units::millis(times.vmm)))
}

/// One sandbox from nothing to nothing.
async fn long(engine: &Engine, spec: &SandboxSpec) -> Result<[f64; 10], CliError> {
    let name = spec.name.as_str();
    let begin = Instant::now();
    let (session, create, start) = launch(engine, spec).await?;
    let ready = since(begin);
    let first = units::millis(command(&session, &["true"]).await?);
    let memory = private_mib(engine, name)?;
    let mut next = Vec::with_capacity(COMMANDS);
    for _ in 0..COMMANDS {
        next.push(command(&session, &["true"]).await?);
    }
    next.sort();
    let python = units::millis(command(&session, &["python3", "-c", "print(6*7)"]).await?);
    drop(session);
    let at = Instant::now();
    engine.stop(name, Duration::from_secs(10)).await?;
    let stop = since(at);
    let at = Instant::now();
    engine.delete(name).await?;
    let delete = since(at);
    let next = units::millis(next[COMMANDS / 2]);
    let total = since(begin);
    Ok([
        create, start, ready, first, next, python, stop, delete, total, memory,
    ])
}

/// One sandbox that runs one command and is deleted as it runs.
async fn short(engine: &Engine, spec: &SandboxSpec) -> Result<[f64; 2], CliError> {
    let begin = Instant::now();
    let (session, ..) = launch(engine, spec).await?;
    command(&session, &["true"]).await?;
    drop(session);
    let at = Instant::now();
    engine.delete(spec.name.as_str()).await?;
    Ok([since(at), since(begin)])
}

/// How many short lives end in a second, with some at one time.
async fn throughput(
    engine: &Engine,
    image: &str,
    kernel: &KernelChoice,
    lives: usize,
) -> Result<f64, CliError> {
    let begin = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for number in 0..lives {
        if running.len() == AT_ONCE {
            finished(running.join_next().await)?;
        }
        let mut spec = SandboxSpec::new(format!("bench-{}-{number}", std::process::id()).parse()?);
        image.clone_into(&mut spec.image);
        spec.kernel.clone_from(kernel);
        spec.ephemeral = true;
        let engine = engine.clone();
        running.spawn(async move { short(&engine, &spec).await.map(|_| ()) });
    }
    while !running.is_empty() {
        finished(running.join_next().await)?;
    }
    #[expect(clippy::cast_precision_loss, reason = "there are not 2^52 lives")]
    let lives = lives as f64;
    Ok(lives / begin.elapsed().as_secs_f64())
}

fn finished(
    life: Option<Result<Result<(), CliError>, tokio::task::JoinError>>,
) -> Result<(), CliError> {
    match life {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(CliError::io("measuring", std::io::Error::other(error))),
    }
}

/// MiB of memory that a sandbox's machine has written to, and so shares with no other process: the pages
/// that belong to no file (proc(5), `smaps_rollup`). What it has only read of files, its template's
/// memory among them, is the host's page cache, for all; proc(5) counts that as private while one
/// process alone maps it.
fn private_mib(engine: &Engine, name: &str) -> Result<f64, CliError> {
    let pid = engine.info(name)?.vmm_pid.unwrap_or(0);
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| CliError::io(format!("reading {path}"), error))?;
    let kib: u32 = text
        .lines()
        .filter(|line| line.starts_with("Anonymous:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok())
        .sum();
    Ok(f64::from(kib) / 1024.0)
}

/// Runs a command to its end, output and all.
async fn command(session: &Session, argv: &[&str]) -> Result<Duration, CliError> {
    let spec = ExecSpec::new(argv.iter().map(Into::into).collect());
    let begin = Instant::now();
    let mut exec = session.exec(&spec).await?;
    loop {
        if let ExecEvent::Exited(status) = exec.next().await? {
            if status.code != Some(0) {
                return Err(CliError::Partly(format!(
                    "`{}` failed in the guest",
                    argv.join(" ")
                )));
            }
            return Ok(begin.elapsed());
        }
    }
}

/// The values of one metric.
struct Series {
    raw: Vec<f64>,
    sorted: Vec<f64>,
}

impl Series {
    fn new(raw: Vec<f64>) -> Self {
        let mut sorted = raw.clone();
        sorted.sort_by(f64::total_cmp);
        Self { raw, sorted }
    }

    /// The nearest-rank percentile: always a value that was measured.
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    fn mean(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "there are not 2^52 sandboxes")]
        let count = self.raw.len() as f64;
        self.raw.iter().sum::<f64>() / count
    }
}

fn show(
    cx: &Context,
    ways: &[(Way, Vec<Series>)],
    build: Option<Duration>,
    per_second: Option<f64>,
    stamp: &Map<String, Value>,
) -> Result<(), CliError> {
    let cell = |value: f64| format!("{value:.1}");
    for (way, series) in ways {
        let rows = METRICS.iter().zip(series).map(|((column, _), series)| {
            vec![
                (*column).to_owned(),
                cell(series.percentile(50)),
                cell(series.percentile(90)),
                cell(series.percentile(99)),
                cell(series.percentile(0)),
                cell(series.percentile(100)),
            ]
        });
        let title = way.name().to_uppercase();
        cx.out.table(
            &[title.as_str(), "P50", "P90", "P99", "MIN", "MAX"],
            rows.collect(),
        )?;
        cx.out.line("")?;
    }
    if let Some(build) = build {
        let build = units::millis(build);
        cx.out
            .line(&format!("template build: {build:.1} ms, once"))?;
    }
    if let Some(per_second) = per_second {
        cx.out.line(&format!(
            "create, run and delete, {AT_ONCE} at once, from a template: {per_second:.1} in a second"
        ))?;
    }
    let count = ways
        .first()
        .and_then(|(_, series)| series.first())
        .map_or(0, |series| series.raw.len());
    cx.out.line(&format!("n: {count} of each"))?;
    for (name, value) in stamp {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        cx.out.line(&format!("{name}: {text}"))?;
    }
    Ok(())
}

fn data(
    args: &Args,
    ways: &[(Way, Vec<Series>)],
    stamp: Map<String, Value>,
    began: jiff::Timestamp,
    took: Duration,
) -> Value {
    let results = |series: &[Series]| {
        let mut results = Map::new();
        for ((_, name), series) in METRICS.iter().zip(series) {
            let stats = json!({
                "p50": series.percentile(50),
                "p90": series.percentile(90),
                "p95": series.percentile(95),
                "p99": series.percentile(99),
                "mean": series.mean(),
                "min": series.percentile(0),
                "max": series.percentile(100),
                "count": series.raw.len(),
            });
            results.insert(
                (*name).to_owned(),
                json!({ "stats": stats, "raw": series.raw }),
            );
        }
        Value::Object(results)
    };
    let all: Map<String, Value> = ways
        .iter()
        .map(|(way, series)| (way.name().to_owned(), results(series)))
        .collect();
    // What a user gets who asks for nothing.
    let default = all.get(Way::Template.name()).cloned();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "environment": stamp,
        "backend": stamp.get("engine"),
        "image": args.image,
        "iterations": args.iterations,
        "started_at": began,
        "duration_s": took.as_secs_f64(),
        "results": default,
        "ways": all,
    })
}

fn write(path: &Path, data: &Value) -> Result<(), CliError> {
    let failed = |error| CliError::io(format!("writing {}", path.display()), error);
    let mut text = serde_json::to_vec_pretty(data).map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    std::fs::write(path, text).map_err(failed)
}

/// What the figures were measured on.
fn environment(engine: &Engine) -> Map<String, Value> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    let memory_kib = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|value| value.trim_end_matches(" kB").parse::<u64>().ok());
    let accel = engine.acceleration().ok().map(|found| {
        if found.kvm {
            "kvm".to_owned()
        } else {
            format!("emulation ({})", prepare::in_short(&found.reason))
        }
    });
    let mut stamp = Map::new();
    let mut add = |name: &str, value: Value| stamp.insert(name.to_owned(), value);
    add("smolvm", json!(env!("CARGO_PKG_VERSION")));
    add("date", json!(format!("{:.0}", jiff::Timestamp::now())));
    add("cpu", json!(field(&read("/proc/cpuinfo"), "model name")));
    add(
        "cores",
        json!(
            std::thread::available_parallelism()
                .ok()
                .map(std::num::NonZero::get)
        ),
    );
    add(
        "memory",
        json!(memory_kib.map(|kib| units::show_bytes(kib * 1024))),
    );
    add(
        "kernel",
        json!(rustix::system::uname().release().to_string_lossy()),
    );
    add("accel", json!(accel));
    let chosen = engine.engine().ok();
    add("engine", json!(chosen.map(|found| found.name.as_str())));
    add("qemu", json!(qemu_version(&engine.config().program_dirs)));
    stamp
}

/// The first line QEMU says of itself; a benchmark may spawn a process for it.
fn qemu_version(dirs: &[PathBuf]) -> Option<String> {
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    let program = dirs
        .iter()
        .map(|dir| dir.join(&name))
        .find(|path| path.is_file())?;
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let series = Series::new((1..=10).rev().map(f64::from).collect());
        let percentiles = [0, 50, 90, 99, 100].map(|percent| series.percentile(percent));
        assert_eq!(
            percentiles.map(|value| value.to_string()),
            ["1", "5", "9", "10", "10"]
        );
        assert_eq!(Series::new(vec![7.0]).percentile(50).to_string(), "7");
        assert_eq!(series.mean().to_string(), "5.5");
    }
}
