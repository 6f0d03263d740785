// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The manual page is made from the command line's definition, and is checked in as `pinion-device.1`.
//!
//! `PINION_UPDATE_MANUAL=1 cargo test -p pinion-device --test manual` writes it anew.

use std::io::Write;
use std::path::Path;

use clap::CommandFactory;
use clap_mangen::Man;
use pinion_device::cli::Arguments;

/// What the definition does not say, in the language of such pages.
const MORE: &str = r#".SH CONTROL SOCKET
With \fB\-\-control\-path\fR the device answers requests on a socket of its own while it runs; the protocol is one line
of JSON for each request and each reply. \fBpinion\-device ctl\fR \fIPATH\fR \fICOMMAND\fR speaks it:
@CTL@.PP
With \fB\-\-json\fR the answer is printed as it came.
.SH SANDBOX
With \fB\-\-sandbox\fR the program keeps only those system calls that serving a frontend takes. It cannot open files,
connect to anything, or begin programs any more. If it tries to do what it must not, it says so and ends with
status 159.
.SH EXIT STATUS
0 after SIGTERM or SIGINT, and when the one connection that was given with \fB\-\-fd\fR has ended; 1 if the device could
not be set up, or a request of \fBctl\fR was not answered or refused; 2 for wrong arguments; 159 if the sandbox ended it.
.SH ENVIRONMENT
.TP
\fBRUST_LOG\fR
How much it says on standard error: error, warn (if nothing is said), info or debug.
.SH FILES
.TP
\fI50\-pinion\-device.json\fR
Describes the program to management software; its place is \fI/usr/share/qemu/vhost\-user\fR.
.SH EXAMPLES
.nf
pinion\-device \-\-socket\-path /tmp/gpu \-\-vram 1G \-\-rings 2 \-\-control\-path /tmp/gpu\-control \-\-sandbox
pinion\-device ctl /tmp/gpu\-control state
pinion\-device ctl /tmp/gpu\-control inject lost\-fault:after=10,count=1
.fi
.SH SEE ALSO
\fBqemu\-system\-x86_64\fR(1)
"#;

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('-', "\\-")
}

fn page() -> String {
    let mut command = Arguments::command();
    command.build();
    let ctl = command.find_subcommand("ctl").expect("the command ctl").clone();
    let requests: String = ctl
        .get_subcommands()
        .filter(|request| request.get_name() != "help")
        .map(|request| {
            let arguments: String = request
                .get_positionals()
                .map(|argument| format!(" \\fI{}\\fR", escape(&argument.to_string())))
                .collect();
            let about = request.get_about().map(ToString::to_string).unwrap_or_default();
            format!(
                ".TP\n\\fB{}\\fR{arguments}\n{}.\n",
                request.get_name(),
                escape(&about)
            )
        })
        .collect();
    let man = Man::new(command).section("1");
    let mut out = Vec::new();
    out.write_all(b".\\\" SPDX-License-Identifier: Apache-2.0 OR MIT\n")
        .unwrap();
    man.render_title(&mut out).unwrap();
    man.render_name_section(&mut out).unwrap();
    man.render_synopsis_section(&mut out).unwrap();
    man.render_description_section(&mut out).unwrap();
    man.render_options_section(&mut out).unwrap();
    let page = String::from_utf8(out).unwrap();
    page + &MORE.replace("@CTL@", &requests)
}

#[test]
fn the_manual_page_is_what_the_command_line_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pinion-device.1");
    let page = page();
    if std::env::var_os("PINION_UPDATE_MANUAL").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == page,
        "{} is out of date; PINION_UPDATE_MANUAL=1 cargo test -p pinion-device --test manual writes it",
        path.display()
    );
}

#[test]
fn the_manual_page_and_the_specification_name_every_option() {
    let page = page();
    let specification = include_str!("../../docs/device.md");
    let command = Arguments::command();
    for option in command.get_opts().filter_map(|option| option.get_long()) {
        assert!(page.contains(&escape(&format!("--{option}"))), "{option}");
        assert!(specification.contains(&format!("--{option}")), "{option}");
    }
    for request in ["statistics", "state", "injections", "inject", "clear", "version"] {
        assert!(page.contains(&format!(".TP\n\\fB{request}\\fR")), "{request}");
        let specification = include_str!("../../docs/control.md");
        assert!(specification.contains(&format!("\n| `{request}` |")), "{request}");
    }
}
