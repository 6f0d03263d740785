// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser};
use pinion_abi::MAX_RINGS;

use crate::gpu::Settings;
use crate::gpu::inject::Injection;
use crate::gpu::vram::{MAX_SIZE, MIN_SIZE, size_is_valid};

/// A virtual GPU for driver development: a vhost-user device.
///
/// It follows the conventions of QEMU for such programs. Set RUST_LOG (error, warn, info, debug) to see
/// more or less of what it does.
#[derive(Debug, Parser)]
#[command(name = "pinion-device", version)]
#[command(group(ArgGroup::new("source").required(true).args(["socket_path", "fd", "print_capabilities"])))]
pub struct Arguments {
    /// Listen for a frontend on this socket, and for the next one when it has gone.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// Use this file descriptor: a socket that is connected to a frontend, or one that listens.
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,

    /// Print what the device can do as JSON, and end.
    #[arg(long)]
    print_capabilities: bool,

    /// Size of VRAM: a number with the suffix K, M, G or T. It takes up memory only as it is used.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    vram: u64,

    /// Number of command rings.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_RINGS)))]
    rings: u16,

    /// Make a deliberate mistake, so that a test can prove that it would notice (may be repeated):
    /// NAME[:after=N,every=N,count=N].
    #[arg(long, value_name = "NAME[:KEY=N]")]
    inject: Vec<Injection>,
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
}

/// A checked configuration.
#[derive(Debug)]
pub struct Config {
    /// Where the frontend comes from.
    pub source: Source,
    /// What the device is like.
    pub settings: Settings,
    /// Its deliberate defects.
    pub inject: Vec<Injection>,
}

impl From<Arguments> for Command {
    fn from(arguments: Arguments) -> Self {
        let source = match (arguments.socket_path, arguments.fd) {
            (Some(path), _) => Source::Path(path),
            (None, Some(fd)) => Source::Fd(fd),
            (None, None) => return Self::PrintCapabilities,
        };
        let settings = Settings {
            vram: arguments.vram,
            rings: arguments.rings,
            engines: arguments.rings,
            ..Settings::default()
        };
        Self::Serve(Config {
            source,
            settings,
            inject: arguments.inject,
        })
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{error}"))?;
    match number.checked_mul(1 << shift) {
        Some(size) if size_is_valid(size) => Ok(size),
        _ => Err(format!(
            "it has to be {}M to {}T, in pages of 4K",
            MIN_SIZE >> 20,
            MAX_SIZE >> 40
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(arguments: &[&str]) -> Result<Command, clap::Error> {
        Arguments::try_parse_from([&["pinion-device"], arguments].concat()).map(Command::from)
    }

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        assert_eq!(parse_size("1g"), Ok(1 << 30));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        for bad in [
            "",
            "M",
            "1",
            "-1M",
            "2T",
            "1048577",
            "99999999999T",
            "1MiB",
            "é",
            "64é",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sources_exclude_each_other() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--socket-path", "a", "--fd", "3"]).is_err());
        assert!(parse(&["--fd=-1"]).is_err());
        assert!(matches!(
            parse(&["--print-capabilities"]),
            Ok(Command::PrintCapabilities)
        ));
        let Ok(Command::Serve(config)) = parse(&["--fd=3", "--rings=2", "--inject=stale-tlb"]) else {
            panic!()
        };
        assert_eq!(config.source, Source::Fd(3));
        assert_eq!(config.settings.rings, 2);
        assert_eq!(config.settings.vram, 256 << 20);
        assert_eq!(config.inject, ["stale-tlb".parse().unwrap()]);
        assert!(parse(&["--fd=3", "--rings=0"]).is_err());
        assert!(parse(&["--fd=3", "--rings=17"]).is_err());
    }
}
