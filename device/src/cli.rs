// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line.

use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand};
use pinion_abi::{MAX_RINGS, PAGE_SIZE};

use crate::control::Request;
use crate::gpu::Settings;
use crate::gpu::inject::{Defect, Injection};
use crate::gpu::vram::{MAX_SIZE, MIN_SIZE, size_is_valid};
use crate::quantity::{self, show_size};

/// The shortest and the longest time that the watchdog may wait.
const WATCHDOG: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(86_400));
/// The longest latency of the bus. Longer ones are no bus any more, but a hang.
const MAX_LATENCY: Duration = Duration::from_secs(1);
/// The slowest bus: a page takes a sixteenth of a second.
const MIN_BANDWIDTH: u64 = 64 << 10;
const MAX_BANDWIDTH: u64 = 1 << 40;

/// A virtual GPU for driver development: a vhost-user device.
///
/// It follows the conventions of QEMU for such programs. Set RUST_LOG (error, warn, info, debug) to see
/// more or less of what it does.
#[derive(Debug, Parser)]
#[command(name = "pinion-device", version)]
#[command(group(ArgGroup::new("source").required(true).args(["socket_path", "fd", "print_capabilities"])))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    #[command(subcommand)]
    tool: Option<Tool>,

    /// Listen for a frontend on this socket, and for the next one when it has gone.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// Use this file descriptor: a socket that is connected to a frontend, or one that listens.
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,

    /// Print what the device can do as JSON, and end. All other arguments are ignored then.
    #[arg(long)]
    print_capabilities: bool,

    /// Listen on this socket for whoever wants to see statistics and state, or switch defects; see the
    /// command ctl.
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,

    /// Size of VRAM: 1M to 1T. It takes up memory only as it is used.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_vram)]
    vram: u64,

    /// How much of VRAM, from its beginning, the guest's processors see through a shared memory region: a
    /// power of two, 4K up to the size of VRAM.
    #[arg(long, value_name = "SIZE", value_parser = parse_aperture)]
    aperture: Option<u64>,

    /// Number of command rings.
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_RINGS)))]
    rings: u16,

    /// Number of engines, up to the number of rings, which they share. If nothing is said each ring has one
    /// of its own.
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_RINGS)))]
    engines: Option<u16>,

    /// End work that runs, or waits for a semaphore or fence, for longer than this (10s, 500ms, 2m), or
    /// "off".
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_watchdog)]
    watchdog: Watchdog,

    /// How long everything takes to cross the bus, in one direction (5us, 1ms).
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_latency)]
    latency: Duration,

    /// Bytes that cross the bus in a second: 64K to 1T. If nothing is said, as many as the host can move.
    #[arg(long, value_name = "SIZE", value_parser = parse_bandwidth)]
    bandwidth: Option<NonZeroU64>,

    /// Make a deliberate mistake, so that a test can prove that it would notice (may be repeated).
    ///
    /// It strikes after that many opportunities, at every how many, and how often in all (0: without end).
    #[arg(long, value_name = "NAME[:after=N,every=N,count=N]", long_help = inject_help())]
    inject: Vec<Injection>,

    /// Give up all system calls that are not needed any more once the device is set up.
    #[arg(long)]
    sandbox: bool,
}

/// How long work may take; none: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watchdog(Option<Duration>);

/// What else the program can do.
#[derive(Debug, Subcommand)]
enum Tool {
    /// Ask a running device through its control socket (--control-path).
    Ctl(Ctl),
}

/// A request to a running device.
#[derive(Debug, Args)]
pub struct Ctl {
    /// The control socket.
    pub path: PathBuf,

    /// Print the answer as it came, one line of JSON.
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    request: CtlRequest,
}

impl Ctl {
    /// What to ask for.
    pub fn request(&self) -> Request {
        match &self.request {
            CtlRequest::Version => Request::Version {},
            CtlRequest::Statistics => Request::Statistics {},
            CtlRequest::State => Request::State {},
            CtlRequest::Injections => Request::Injections {},
            CtlRequest::Inject { defect } => Request::from(*defect),
            CtlRequest::Clear { defect } => Request::Clear {
                defect: defect.name().into(),
            },
        }
    }
}

#[derive(Debug, Subcommand)]
enum CtlRequest {
    /// The versions of the program and of the control socket's protocol.
    Version,
    /// What the device has counted since its frontend connected.
    Statistics,
    /// What the device is doing.
    State,
    /// The deliberate defects that are switched on, and what they have done.
    Injections,
    /// Switch a deliberate defect on, counting from zero.
    Inject {
        /// As with --inject.
        #[arg(value_name = "NAME[:after=N,every=N,count=N]")]
        defect: Injection,
    },
    /// Switch a deliberate defect off.
    Clear {
        /// Its name.
        #[arg(value_name = "NAME", value_parser = parse_defect)]
        defect: Defect,
    },
}

/// Where the frontend comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// It connects to this path.
    Path(PathBuf),
    /// It is behind, or connects to, this file descriptor.
    Fd(RawFd),
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Print the capabilities.
    PrintCapabilities,
    /// Serve frontends.
    Serve(Config),
    /// Ask a running device.
    Ask(Ctl),
}

/// A checked configuration.
#[derive(Debug)]
pub struct Config {
    /// Where the frontend comes from.
    pub source: Source,
    /// Where the control socket is.
    pub control: Option<PathBuf>,
    /// What the device is like.
    pub settings: Settings,
    /// Its deliberate defects.
    pub inject: Vec<Injection>,
    /// Whether to give up what is not needed.
    pub sandbox: bool,
}

impl Command {
    /// From the arguments of the program, its own name first.
    pub fn parse(arguments: &[std::ffi::OsString]) -> Result<Self, clap::Error> {
        // QEMU's conventions: with this one, everything else is ignored, wrong or not.
        if arguments
            .iter()
            .any(|argument| argument == "--print-capabilities")
        {
            return Ok(Self::PrintCapabilities);
        }
        Arguments::try_parse_from(arguments)?.check()
    }
}

impl Arguments {
    /// What each says is right; here is what they say together.
    fn check(self) -> Result<Command, clap::Error> {
        if let Some(Tool::Ctl(ctl)) = self.tool {
            return Ok(Command::Ask(ctl));
        }
        let source = match (self.socket_path, self.fd) {
            (Some(path), _) => Source::Path(path),
            (None, Some(fd)) => Source::Fd(fd),
            (None, None) => return Ok(Command::PrintCapabilities),
        };
        let refuse = |message: String| Err(Self::command().error(ErrorKind::ValueValidation, message));
        let aperture = self.aperture.unwrap_or(0);
        if aperture > self.vram {
            let (aperture, vram) = (show_size(aperture), show_size(self.vram));
            return refuse(format!(
                "--aperture {aperture}: it cannot be larger than VRAM (--vram {vram})"
            ));
        }
        let engines = self.engines.unwrap_or(self.rings);
        if engines > self.rings {
            return refuse(format!(
                "--engines {engines}: there cannot be more of them than rings (--rings {})",
                self.rings
            ));
        }
        if let (Source::Path(path), Some(control)) = (&source, &self.control_path) {
            if path == control {
                return refuse(format!(
                    "--control-path {}: it has to be another than --socket-path",
                    control.display()
                ));
            }
        }
        Ok(Command::Serve(Config {
            source,
            control: self.control_path,
            settings: Settings {
                vram: self.vram,
                aperture,
                rings: self.rings,
                engines,
                watchdog: self.watchdog.0,
                latency: self.latency,
                bandwidth: self.bandwidth,
            },
            inject: self.inject,
            sandbox: self.sandbox,
        }))
    }
}

fn parse_vram(text: &str) -> Result<u64, String> {
    match quantity::size(text)? {
        size if size_is_valid(size) => Ok(size),
        _ => Err(format!(
            "it has to be {} to {}, in pages of {}",
            show_size(MIN_SIZE),
            show_size(MAX_SIZE),
            show_size(PAGE_SIZE)
        )),
    }
}

fn parse_aperture(text: &str) -> Result<u64, String> {
    match quantity::size(text)? {
        size if size.is_power_of_two() && (PAGE_SIZE..=MAX_SIZE).contains(&size) => Ok(size),
        _ => Err(format!(
            "it has to be a power of two, {} to {}",
            show_size(PAGE_SIZE),
            show_size(MAX_SIZE)
        )),
    }
}

fn parse_watchdog(text: &str) -> Result<Watchdog, String> {
    if text == "off" {
        return Ok(Watchdog(None));
    }
    match quantity::duration(text) {
        Ok(time) if (WATCHDOG.0..=WATCHDOG.1).contains(&time) => Ok(Watchdog(Some(time))),
        Ok(_) => Err(format!(
            "it has to be {:?} to {:?}, or off",
            WATCHDOG.0, WATCHDOG.1
        )),
        Err(error) => Err(format!("{error}, or off")),
    }
}

fn parse_latency(text: &str) -> Result<Duration, String> {
    match quantity::duration(text)? {
        time if time <= MAX_LATENCY => Ok(time),
        _ => Err(format!("it has to be 0 to {MAX_LATENCY:?}")),
    }
}

fn parse_bandwidth(text: &str) -> Result<NonZeroU64, String> {
    let bytes = quantity::size(text)?;
    NonZeroU64::new(bytes)
        .filter(|_| (MIN_BANDWIDTH..=MAX_BANDWIDTH).contains(&bytes))
        .ok_or_else(|| {
            format!(
                "it has to be {} to {}",
                show_size(MIN_BANDWIDTH),
                show_size(MAX_BANDWIDTH)
            )
        })
}

fn parse_defect(text: &str) -> Result<Defect, String> {
    let injection: Injection = text
        .parse()
        .map_err(|error: crate::gpu::inject::ParseError| error.to_string())?;
    if injection == injection.defect.usual() && text == injection.defect.name() {
        Ok(injection.defect)
    } else {
        Err("its name is enough".into())
    }
}

fn inject_help() -> String {
    let names = Defect::ALL.map(Defect::name).join(", ");
    format!(
        "Make a deliberate mistake, so that a test can prove that it would notice (may be repeated).\n\n\
         It strikes when \"after\" opportunities have passed and from then on at every \"every\"th, \"count\" \
         times in all (0: without end). Names: {names}."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Command, clap::Error> {
        let arguments = [&["pinion-device"], arguments].concat();
        Command::parse(&arguments.into_iter().map(Into::into).collect::<Vec<_>>())
    }

    fn settings(arguments: &[&str]) -> Settings {
        match parse(&[&["--fd=3"], arguments].concat()) {
            Ok(Command::Serve(config)) => config.settings,
            other => panic!("{arguments:?}: {other:?}"),
        }
    }

    fn refused(arguments: &[&str]) -> String {
        match parse(&[&["--fd=3"], arguments].concat()) {
            Err(error) => error.to_string(),
            Ok(command) => panic!("{arguments:?} was taken: {command:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sources_exclude_each_other() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--socket-path", "a", "--fd", "3"]).is_err());
        assert!(parse(&["--fd=-1"]).is_err());
        let Ok(Command::Serve(config)) = parse(&["--fd=3", "--rings=2", "--inject=stale-tlb"]) else {
            panic!()
        };
        assert_eq!(config.source, Source::Fd(3));
        assert_eq!(config.inject, ["stale-tlb".parse().unwrap()]);
        assert!(!config.sandbox && config.control.is_none());
    }

    #[test]
    fn capabilities_are_printed_whatever_else_is_said() {
        for others in [
            &[][..],
            &["--fd=3"],
            &["--socket-path", "a", "--fd=3"],
            &["--vram=lots", "--unknown", "rubbish"],
        ] {
            for arguments in [
                [others, &["--print-capabilities"]].concat(),
                [&["--print-capabilities"], others].concat(),
            ] {
                assert!(
                    matches!(parse(&arguments), Ok(Command::PrintCapabilities)),
                    "{arguments:?}"
                );
            }
        }
    }

    #[test]
    fn settings_of_the_device() {
        let usual = settings(&[]);
        assert_eq!((usual.vram, usual.aperture), (256 << 20, 0));
        assert_eq!((usual.rings, usual.engines), (2, 2));
        assert_eq!(usual.watchdog, Some(Duration::from_secs(10)));
        assert_eq!((usual.latency, usual.bandwidth), (Duration::ZERO, None));

        let all = settings(&[
            "--vram=1T",
            "--aperture=64M",
            "--rings=16",
            "--engines=3",
            "--watchdog=2.5",
            "--latency=5us",
            "--bandwidth=1G",
        ]);
        assert_eq!((all.vram, all.aperture), (1 << 40, 64 << 20));
        assert_eq!((all.rings, all.engines), (16, 3));
        assert_eq!(all.watchdog, Some(Duration::from_millis(2500)));
        assert_eq!(all.latency, Duration::from_micros(5));
        assert_eq!(all.bandwidth, NonZeroU64::new(1 << 30));

        assert_eq!(settings(&["--rings=5"]).engines, 5);
        assert_eq!(settings(&["--watchdog=off"]).watchdog, None);
        assert_eq!(settings(&["--vram=64M", "--aperture=64M"]).aperture, 64 << 20);
        assert_eq!(settings(&["--vram=1M", "--aperture=4K"]).aperture, 4096);
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        for (arguments, value, allowed) in [
            (&["--vram=2T"][..], "2T", "1M to 1T"),
            (&["--vram=1048577"], "1048577", "pages of 4K"),
            (&["--aperture=3M"], "3M", "power of two"),
            (&["--aperture=2K"], "2K", "4K to 1T"),
            (&["--aperture=0"], "0", "4K to 1T"),
            (&["--vram=64M", "--aperture=128M"], "128M", "--vram 64M"),
            (&["--rings=0"], "0", "1..=16"),
            (&["--rings=17"], "17", "1..=16"),
            (&["--engines=0"], "0", "1..=16"),
            (&["--rings=2", "--engines=3"], "3", "--rings 2"),
            (&["--watchdog=0"], "0", "1ms to 86400s, or off"),
            (&["--watchdog=never"], "never", "500ms, or off"),
            (&["--latency=2s"], "2s", "0 to 1s"),
            (&["--latency=x"], "x", "500ms"),
            (&["--bandwidth=0"], "0", "64K to 1T"),
            (&["--bandwidth=fast"], "fast", "K, M, G or T"),
            (&["--inject=nothing"], "nothing", "stale-tlb, lost-fault"),
            (&["--inject=lost-fault:every=0"], "every=0", "not zero"),
        ] {
            let said = refused(arguments);
            assert!(
                said.contains(value) && said.contains(allowed),
                "{arguments:?} said: {said}"
            );
        }
        let same = parse(&["--socket-path=a", "--control-path=a"]).unwrap_err();
        assert!(same.to_string().contains("--control-path a"));
    }

    #[test]
    fn requests_to_a_running_device() {
        let ask = |arguments: &[&str]| match parse(&[&["ctl", "here"], arguments].concat()) {
            Ok(Command::Ask(ctl)) => (ctl.request(), ctl.json),
            other => panic!("{arguments:?}: {other:?}"),
        };
        assert_eq!(ask(&["state"]), (Request::State {}, false));
        assert_eq!(ask(&["--json", "statistics"]), (Request::Statistics {}, true));
        assert_eq!(ask(&["injections", "--json"]), (Request::Injections {}, true));
        assert_eq!(
            ask(&["inject", "lost-fault:after=2,every=3,count=1"]).0,
            Request::Inject {
                defect: "lost-fault".into(),
                after: Some(2),
                every: Some(3),
                count: Some(1)
            }
        );
        assert_eq!(
            ask(&["clear", "stale-tlb"]).0,
            Request::Clear {
                defect: "stale-tlb".into()
            }
        );
        assert!(parse(&["ctl"]).is_err());
        assert!(parse(&["ctl", "here"]).is_err());
        assert!(parse(&["ctl", "here", "clear", "lost-fault:after=3"]).is_err());
        assert!(parse(&["ctl", "here", "inject", "nothing"]).is_err());
        assert!(parse(&["--fd=3", "ctl", "here", "state"]).is_err());
    }
}
