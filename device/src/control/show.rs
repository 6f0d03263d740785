// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Replies as text for people.

use std::fmt::{self, Display, Write};

use pinion_abi as abi;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Request;
use super::protocol::Injected;
use crate::gpu::state::{Activity, State};
use crate::quantity::show_size;

/// The result of `request`, in lines.
pub(super) fn text(request: &Request, result: Value) -> Result<String, serde_json::Error> {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = match request {
        Request::Statistics {} => statistics(&mut out, &serde_json::from_value(result)?),
        Request::State {} => state(&mut out, &serde_json::from_value(result)?),
        Request::Injections {} => injections(&mut out, &serde_json::from_value(result)?),
        Request::Help {} | Request::Version {} | Request::Inject { .. } | Request::Clear { .. } => {
            fields(&mut out, &serde_json::from_value(result)?)
        }
    };
    Ok(out)
}

fn fields(out: &mut String, result: &Map<String, Value>) -> fmt::Result {
    for (name, value) in result {
        match value {
            Value::String(text) => writeln!(out, "{name}: {text}")?,
            Value::Bool(bit) => writeln!(out, "{name}: {}", yes(*bit))?,
            other => writeln!(out, "{name}: {other}")?,
        }
    }
    Ok(())
}

fn yes(bit: bool) -> &'static str {
    if bit { "yes" } else { "no" }
}

#[derive(Deserialize)]
struct Connection {
    connected: bool,
    connections: u64,
}

impl Display for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            connected,
            connections,
        } = self;
        write!(
            formatter,
            "frontend connected: {} (connections so far: {connections})",
            yes(*connected)
        )
    }
}

#[derive(Deserialize)]
struct Statistics {
    #[serde(flatten)]
    connection: Connection,
    counters: Map<String, Value>,
}

fn statistics(out: &mut String, statistics: &Statistics) -> fmt::Result {
    writeln!(out, "{}", statistics.connection)?;
    let width = statistics.counters.keys().map(String::len).max().unwrap_or(0);
    for (name, count) in &statistics.counters {
        writeln!(out, "{name:width$}  {count}")?;
    }
    Ok(())
}

#[derive(Deserialize)]
struct Whole {
    #[serde(flatten)]
    connection: Connection,
    #[serde(flatten)]
    state: State,
}

fn status(status: u32) -> String {
    match status {
        abi::STATUS_OK => "alive".into(),
        abi::STATUS_BUS_ERROR => "in error: bus error".into(),
        abi::STATUS_CONTEXT_ERROR => "in error".into(),
        abi::STATUS_FAULT_CANCELLED => "in error: fault cancelled".into(),
        abi::STATUS_HUNG => "in error: hung".into(),
        other => format!("in error: status {other}"),
    }
}

fn reason(reason: u8) -> String {
    match reason {
        abi::REASON_NOT_PRESENT => "not present".into(),
        abi::REASON_READ => "no right to read".into(),
        abi::REASON_WRITE => "no right to write".into(),
        abi::REASON_ATOMIC => "no right to atomics".into(),
        abi::REASON_POISONED => "poisoned".into(),
        abi::REASON_BAD_ADDRESS => "bad address".into(),
        other => format!("reason {other}"),
    }
}

fn state(out: &mut String, whole: &Whole) -> fmt::Result {
    let State {
        device,
        contexts,
        rings,
        faults,
        pending_events,
    } = &whole.state;
    writeln!(out, "{}", whole.connection)?;
    writeln!(
        out,
        "vram: {}, in use: {}; device time: {} ns; pending events: {pending_events}",
        show_size(device.vram_size),
        show_size(device.vram_used),
        device.time
    )?;
    for ring in rings {
        write!(
            out,
            "ring {}: engine {}, timeline {}, submitted {}, ",
            ring.ring, ring.engine, ring.timeline, ring.submitted
        )?;
        match ring.activity {
            Activity::Idle => writeln!(out, "idle")?,
            Activity::Running => writeln!(out, "running")?,
            Activity::Waiting => writeln!(out, "waiting")?,
            Activity::Crossing => writeln!(out, "waiting for the bus")?,
            Activity::Stalled {
                fault,
                va,
                reason: why,
            } => writeln!(out, "stalled on fault {fault} at {va:#x}: {}", reason(why))?,
        }
    }
    for context in contexts {
        writeln!(
            out,
            "context {}: {}, page-table nodes: {}",
            context.id,
            status(context.status),
            context.page_table_nodes
        )?;
    }
    for fault in faults {
        writeln!(
            out,
            "fault {}: context {}, {:#x}, {}, rings stalled: {}{}",
            fault.fault,
            fault.context,
            fault.va,
            reason(fault.reason),
            fault.stalled,
            if fault.replaying { ", being replayed" } else { "" }
        )?;
    }
    Ok(())
}

#[derive(Deserialize)]
struct Injections {
    injections: Vec<Injected>,
}

fn injections(out: &mut String, list: &Injections) -> fmt::Result {
    if list.injections.is_empty() {
        return writeln!(out, "no defect is switched on");
    }
    for Injected {
        defect,
        after,
        every,
        count,
        opportunities,
        strikes,
    } in &list.injections
    {
        writeln!(
            out,
            "{defect}:after={after},every={every},count={count}  opportunities: {opportunities}, strikes: {strikes}"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_state_in_lines() {
        let result = json!({
            "connected": true, "connections": 2,
            "device": {"vram_size": 1 << 30, "vram_used": 4096, "time": 5},
            "contexts": [{"id": 3, "status": abi::STATUS_HUNG, "page_table_nodes": 4}],
            "rings": [
                {"ring": 0, "engine": 0, "timeline": 9, "submitted": 10, "activity": "idle"},
                {"ring": 1, "engine": 0, "timeline": 0, "submitted": 1,
                 "activity": {"stalled": {"fault": 7, "va": 4096, "reason": abi::REASON_WRITE}}},
            ],
            "faults": [{"fault": 7, "context": 3, "va": 4096, "reason": abi::REASON_WRITE, "stalled": 1,
                "replaying": true}],
            "pending_events": 1,
        });
        assert_eq!(
            text(&Request::State {}, result).unwrap(),
            "frontend connected: yes (connections so far: 2)\n\
             vram: 1G, in use: 4K; device time: 5 ns; pending events: 1\n\
             ring 0: engine 0, timeline 9, submitted 10, idle\n\
             ring 1: engine 0, timeline 0, submitted 1, stalled on fault 7 at 0x1000: no right to write\n\
             context 3: in error: hung, page-table nodes: 4\n\
             fault 7: context 3, 0x1000, no right to write, rings stalled: 1, being replayed\n"
        );
    }

    #[test]
    fn other_replies_in_lines() {
        let counters = json!({"connected": false, "connections": 0, "counters": {"a": 1, "long": 22}});
        assert_eq!(
            text(&Request::Statistics {}, counters).unwrap(),
            "frontend connected: no (connections so far: 0)\na     1\nlong  22\n"
        );
        let none = json!({"injections": []});
        assert_eq!(
            text(&Request::Injections {}, none).unwrap(),
            "no defect is switched on\n"
        );
        let one = json!({"injections": [{"defect": "x", "after": 1, "every": 2, "count": 3,
            "opportunities": 4, "strikes": 5}]});
        assert_eq!(
            text(&Request::Injections {}, one).unwrap(),
            "x:after=1,every=2,count=3  opportunities: 4, strikes: 5\n"
        );
        let clear = json!({"defect": "x", "was_on": true});
        let request = Request::Clear { defect: "x".into() };
        assert_eq!(text(&request, clear).unwrap(), "defect: x\nwas_on: yes\n");
        assert!(text(&Request::State {}, json!({"connected": 1})).is_err());
    }
}
