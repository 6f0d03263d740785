// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Requests and replies: an object of JSON in a line each.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::Subject;
use crate::gpu::inject::{Active, Defect, Injection};
use crate::gpu::state::State;

/// Version of the protocol.
pub const VERSION: u64 = 1;
/// Most bytes in the line of a request.
pub const MAX_LINE: usize = 4096;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What can be asked for.
    Help {},
    /// Which versions of what this is.
    Version {},
    /// What the device has counted since its frontend connected.
    Statistics {},
    /// What the device is doing.
    State {},
    /// The defects that are switched on.
    Injections {},
    /// Switches a defect on, counting from zero.
    Inject {
        /// Its name.
        defect: String,
        /// [`Injection::after`]; if it is not there, what is usual for the defect. So with the others.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<u64>,
        /// [`Injection::every`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        every: Option<u64>,
        /// [`Injection::count`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        count: Option<u64>,
    },
    /// Switches a defect off.
    Clear {
        /// Its name.
        defect: String,
    },
}

/// Names of all requests.
const COMMANDS: [&str; 7] = [
    "help",
    "version",
    "statistics",
    "state",
    "injections",
    "inject",
    "clear",
];

impl From<Injection> for Request {
    fn from(injection: Injection) -> Self {
        Self::Inject {
            defect: injection.defect.name().into(),
            after: Some(injection.after),
            every: Some(injection.every),
            count: Some(injection.count),
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("this is not JSON: {0}")]
    Json(#[source] serde_json::Error),
    #[error("a request is an object")]
    NoObject,
    #[error("this is version {VERSION} of the protocol, not {0}")]
    Version(Value),
    #[error("{0}")]
    Request(#[source] serde_json::Error),
    #[error(transparent)]
    Defect(#[from] crate::gpu::inject::ParseError),
    #[error("\"every\" has to be one at least")]
    Every,
    #[error("there are {0} clients already")]
    TooMany(usize),
    #[error("there is no device at the moment")]
    NoDevice,
}

/// An entry of the reply to `injections`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injected {
    /// Its name.
    pub defect: String,
    /// See [`Injection`].
    pub after: u64,
    /// See [`Injection`].
    pub every: u64,
    /// See [`Injection`].
    pub count: u64,
    /// See [`Active`].
    pub opportunities: u64,
    /// See [`Active`].
    pub strikes: u64,
}

impl From<Active> for Injected {
    fn from(active: Active) -> Self {
        let Injection {
            defect,
            after,
            every,
            count,
        } = active.injection;
        Self {
            defect: defect.name().into(),
            after,
            every,
            count,
            opportunities: active.opportunities,
            strikes: active.strikes,
        }
    }
}

/// What came of a request that was carried out.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer {
    Help {
        commands: [&'static str; COMMANDS.len()],
        defects: [&'static str; Defect::ALL.len()],
    },
    Version {
        program: &'static str,
        protocol: u64,
        interface: u32,
    },
    Statistics {
        connected: bool,
        connections: u64,
        #[serde(serialize_with = "as_map")]
        counters: Vec<(&'static str, u64)>,
    },
    State {
        connected: bool,
        connections: u64,
        #[serde(flatten)]
        state: State,
    },
    Injections {
        injections: Vec<Injected>,
    },
    Inject {
        defect: &'static str,
        after: u64,
        every: u64,
        count: u64,
    },
    Clear {
        defect: &'static str,
        was_on: bool,
    },
}

fn as_map<S: Serializer>(list: &[(&'static str, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(list.iter().copied())
}

/// A reply: either `result` or `error` is there.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply<T> {
    pub(super) version: u64,
    /// Of the request, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<Value>,
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<T>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// `#[serde(default)]` alone would want a `T: Default`.
fn none<T>() -> Option<T> {
    None
}

fn defect(name: &str) -> Result<Defect, Error> {
    Defect::by_name(name).ok_or_else(|| crate::gpu::inject::ParseError::Name(name.into()).into())
}

fn carry_out(request: Request, subject: &Subject) -> Result<Answer, Error> {
    Ok(match request {
        Request::Help {} => Answer::Help {
            commands: COMMANDS,
            defects: Defect::ALL.map(Defect::name),
        },
        Request::Version {} => Answer::Version {
            program: env!("CARGO_PKG_VERSION"),
            protocol: VERSION,
            interface: pinion_abi::VERSION,
        },
        Request::Statistics {} => {
            let (device, connected, connections) = subject.current().ok_or(Error::NoDevice)?;
            Answer::Statistics {
                connected,
                connections,
                counters: device.statistics(),
            }
        }
        Request::State {} => {
            let (device, connected, connections) = subject.current().ok_or(Error::NoDevice)?;
            Answer::State {
                connected,
                connections,
                state: device.state(),
            }
        }
        Request::Injections {} => Answer::Injections {
            injections: subject
                .injector
                .active()
                .into_iter()
                .map(Injected::from)
                .collect(),
        },
        Request::Inject {
            defect: name,
            after,
            every,
            count,
        } => {
            let usual = defect(&name)?.usual();
            let injection = Injection {
                defect: usual.defect,
                after: after.unwrap_or(usual.after),
                every: every.unwrap_or(usual.every),
                count: count.unwrap_or(usual.count),
            };
            if injection.every == 0 {
                return Err(Error::Every);
            }
            subject.injector.switch_on(injection);
            let Injection {
                defect,
                after,
                every,
                count,
            } = injection;
            Answer::Inject {
                defect: defect.name(),
                after,
                every,
                count,
            }
        }
        Request::Clear { defect: name } => {
            let defect = defect(&name)?;
            Answer::Clear {
                defect: defect.name(),
                was_on: subject.injector.switch_off(defect),
            }
        }
    })
}

/// Takes `id` and `version`, which every request may have, out of it.
fn decode(line: &[u8], id: &mut Option<Value>) -> Result<Request, Error> {
    let mut value: Value = serde_json::from_slice(line).map_err(Error::Json)?;
    let object = value.as_object_mut().ok_or(Error::NoObject)?;
    *id = object.remove("id");
    match object.remove("version") {
        Some(version) if version.as_u64() != Some(VERSION) => return Err(Error::Version(version)),
        _ => {}
    }
    serde_json::from_value(value).map_err(Error::Request)
}

/// The line that answers a line.
pub(super) fn answer(line: &[u8], subject: &Subject) -> Vec<u8> {
    let mut id = None;
    let result = decode(line, &mut id).and_then(|request| carry_out(request, subject));
    reply(id, result)
}

/// The line that answers what is no request.
pub(super) fn refusal(error: Error) -> Vec<u8> {
    reply(None, Err(error))
}

fn reply(id: Option<Value>, result: Result<Answer, Error>) -> Vec<u8> {
    let (result, error) = match result {
        Ok(answer) => (Some(answer), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let reply = Reply {
        version: VERSION,
        id,
        result,
        error,
    };
    // It holds nothing that cannot be written as JSON.
    let mut line = serde_json::to_vec(&reply).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::control::Device;
    use crate::gpu::inject::Injector;
    use crate::gpu::state::{ContextState, State};
    use serde_json::json;

    struct Dummy;

    impl Device for Dummy {
        fn statistics(&self) -> Vec<(&'static str, u64)> {
            vec![("requests", 3), ("faults", u64::MAX)]
        }
        fn state(&self) -> State {
            State {
                contexts: vec![ContextState {
                    id: 7,
                    ..ContextState::default()
                }],
                ..State::default()
            }
        }
    }

    fn subject() -> (Arc<Subject>, Arc<dyn Device>) {
        let device: Arc<dyn Device> = Arc::new(Dummy);
        let subject = Subject::new(Arc::new(Injector::default()));
        subject.waits(Arc::downgrade(&device));
        (subject, device)
    }

    fn ask(subject: &Subject, line: &str) -> Value {
        let reply = answer(line.as_bytes(), subject);
        assert_eq!(reply.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice(&reply).unwrap()
    }

    #[test]
    fn statistics_and_state_are_those_of_the_device() {
        let (subject, _device) = subject();
        assert_eq!(
            ask(&subject, r#"{"command":"statistics"}"#),
            json!({"version": 1, "result": {"connected": false, "connections": 0,
                "counters": {"requests": 3, "faults": u64::MAX}}})
        );
        subject.connected();
        let state = ask(&subject, r#"{"command":"state"}"#);
        assert_eq!(state["result"]["connected"], json!(true));
        assert_eq!(state["result"]["connections"], json!(1));
        assert_eq!(state["result"]["contexts"][0]["id"], json!(7));
        let parsed: State = serde_json::from_value(state["result"].clone()).unwrap();
        assert_eq!(parsed, Dummy.state());
    }

    #[test]
    fn without_a_device_there_is_an_error() {
        let (subject, device) = subject();
        drop(device);
        let said = ask(&subject, r#"{"command":"state","id":"x"}"#);
        assert_eq!(
            said,
            json!({"version": 1, "id": "x", "error": "there is no device at the moment"})
        );
    }

    #[test]
    fn defects_are_switched() {
        let (subject, _device) = subject();
        let on = ask(
            &subject,
            r#"{"command":"inject","defect":"lost-fault","count":2,"id":[1],"version":1}"#,
        );
        assert_eq!(
            on,
            json!({"version": 1, "id": [1],
                "result": {"defect": "lost-fault", "after": 3, "every": 4, "count": 2}})
        );
        subject.injector().strikes(Defect::LostFault);
        assert_eq!(
            ask(&subject, r#"{"command":"injections"}"#)["result"]["injections"],
            json!([{"defect": "lost-fault", "after": 3, "every": 4, "count": 2,
                "opportunities": 1, "strikes": 0}])
        );
        let clear = r#"{"command":"clear","defect":"lost-fault"}"#;
        assert_eq!(ask(&subject, clear)["result"]["was_on"], json!(true));
        assert_eq!(ask(&subject, clear)["result"]["was_on"], json!(false));
    }

    #[test]
    fn help_names_every_command() {
        let (subject, _device) = subject();
        for command in COMMANDS {
            let said = ask(&subject, &format!(r#"{{"command":"{command}"}}"#));
            let unknown = said["error"]
                .as_str()
                .is_some_and(|error| error.contains("unknown variant"));
            assert!(!unknown, "{command}: {said}");
        }
        assert_eq!(
            ask(&subject, r#"{"command":"help"}"#)["result"]["commands"],
            json!(COMMANDS)
        );
        assert_eq!(
            ask(&subject, r#"{"command":"version"}"#)["result"]["protocol"],
            json!(1)
        );
    }

    #[test]
    fn bad_requests_are_refused_with_a_reason() {
        let (subject, _device) = subject();
        let deep = "[".repeat(4000);
        for (line, reason) in [
            ("", "not JSON"),
            ("{", "not JSON"),
            (&deep, "not JSON"),
            ("[]", "object"),
            ("{}", "command"),
            (r#"{"command":"fly"}"#, "fly"),
            (r#"{"command":"state","version":2}"#, "not 2"),
            (r#"{"command":"state","verbose":true}"#, "verbose"),
            (r#"{"command":"inject"}"#, "defect"),
            (r#"{"command":"inject","defect":"nothing"}"#, "stale-tlb"),
            (r#"{"command":"inject","defect":"stale-tlb","every":0}"#, "every"),
            (r#"{"command":"inject","defect":"stale-tlb","after":-1}"#, "-1"),
            (r#"{"command":"clear","defect":"nothing"}"#, "stale-tlb"),
        ] {
            let said = ask(&subject, line);
            let error = said["error"].as_str().unwrap_or_default();
            assert!(error.contains(reason), "{line}: {said}");
            assert!(said.get("result").is_none());
        }
        assert!(subject.injector().active().is_empty());
    }

    #[test]
    fn requests_survive_the_way() {
        for request in [
            Request::State {},
            Request::Clear { defect: "x".into() },
            Request::from(Defect::LostFault.usual()),
        ] {
            let line = serde_json::to_vec(&request).unwrap();
            assert_eq!(decode(&line, &mut None).unwrap(), request);
        }
    }
}
