// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Looking through all states of a scenario.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};

use crate::properties as p;
use crate::scenario::Scenario;
use crate::state::State;
use crate::system::{Action, Machine};

/// A scenario, as Stateright sees it.
#[derive(Clone, Debug)]
pub struct System(pub Scenario);

impl Model for System {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![Machine::initial(&self.0)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let everybody = Machine::everybody(&self.0).into_iter();
        actions.extend(everybody.filter(|action| self.next_state(state, *action).is_some()));
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut machine = Machine {
            setup: &self.0,
            s: *state,
        };
        machine.step(action).then_some(machine.s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(p::EXCLUSIVE, |this: &Self, state| p::exclusive(&this.0, state)),
            Property::always(p::NO_LOST_UPDATE, |_, state| p::no_lost_update(state)),
            Property::always(p::NO_FREED_PAGE, |this, state| p::no_freed_page(&this.0, state)),
            Property::always(p::ONE_OWNER, |_, state| p::one_owner(state)),
            Property::always(p::NOTHING_STALE, |this, state| p::nothing_stale(&this.0, state)),
            Property::always(p::GRANT_IS_KEPT, |_, state: &State| !state.grant_broken),
            Property::always(p::CONTEXT_IS_KNOWN, |_, state: &State| !state.revoked_unknown),
            Property::eventually(p::ALL_ENDS, |this, state| {
                let setup = &this.0;
                Machine { setup, s: *state }.is_finished()
            }),
        ]
    }
}

/// Steps, each with the state before it.
pub type Run = Vec<(State, Action)>;

/// What has been found.
pub struct Report {
    /// How many states there are (or were looked at before something was found).
    pub states: usize,
    /// Steps to the last of them.
    pub depth: usize,
    /// What does not hold, and the shortest run after which it does not: its steps, each with the state before it.
    pub violated: Vec<(&'static str, Run)>,
}

impl Report {
    /// The names of what does not hold.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        self.violated.iter().map(|(name, _)| *name).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} states, {} steps, violated: {:?}",
            self.states,
            self.depth,
            self.names()
        )
    }
}

/// Looks through all states, breadth first; ends soon after something is found not to hold.
///
/// That all work ends is looked at in states in which nobody can take a step. It is once and for all, so that no
/// run is missed where two meet (a known limit of Stateright's `eventually`). Runs that never end are found
/// by [`livelock`].
#[must_use]
pub fn check(scenario: &Scenario) -> Report {
    let checker = System(scenario.clone()).checker();
    let checker = checker
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let mut names: Vec<_> = checker.discoveries().into_keys().collect();
    names.sort_unstable();
    Report {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        violated: names
            .into_iter()
            .map(|name| (name, shortest(scenario, name)))
            .collect(),
    }
}

/// The shortest run after which a property does not hold. (Of several that it finds, Stateright keeps the last.)
fn shortest(scenario: &Scenario, name: &str) -> Run {
    let model = System(scenario.clone());
    let properties = model.properties();
    let Some(property) = properties.iter().find(|property| property.name == name) else {
        return Run::new();
    };
    // All states that have been found, with where they have been found from.
    let mut found: Vec<(State, Option<(usize, Action)>)> = Vec::new();
    let mut seen: HashSet<State> = HashSet::new();
    found.extend(model.init_states().into_iter().map(|state| (state, None)));
    let mut next = 0;
    while let Some(&(state, _)) = found.get(next) {
        let mut actions = Vec::new();
        model.actions(&state, &mut actions);
        let looked_at = property.expectation == Expectation::Always || actions.is_empty();
        if looked_at && !(property.condition)(&model, &state) {
            break;
        }
        for action in actions {
            if let Some(state) = model
                .next_state(&state, action)
                .filter(|state| seen.insert(*state))
            {
                found.push((state, Some((next, action))));
            }
        }
        next += 1;
    }
    let mut run = Run::new();
    while let Some(&(_, Some((from, action)))) = found.get(next) {
        run.push((found[from].0, action));
        next = from;
    }
    run.reverse();
    run
}

/// A run that never ends: after its last step everything is as it was before step `back` (from zero).
#[derive(Debug)]
pub struct Endless {
    /// The steps, each with the state before it.
    pub run: Run,
    /// Where it comes back to.
    pub back: usize,
}

/// Looks for a run that never ends: a state to which there is a way back. Returns how many states there are, or such
/// a run. As nothing is assumed about who takes the next step, a scenario without such a
/// run ends whatever the order.
///
/// # Errors
///
/// The run.
pub fn livelock(scenario: &Scenario) -> Result<usize, Endless> {
    let model = System(scenario.clone());
    let fingerprint = |state: &State| {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        hasher.finish()
    };
    // Whether a state is on the way to the one that is being looked at.
    let mut seen: HashMap<u64, bool> = HashMap::new();
    let mut way: Vec<(State, u64, Vec<Action>)> = Vec::new();
    let enter = |state: State, way: &mut Vec<(State, u64, Vec<Action>)>| {
        let mut actions = Vec::new();
        model.actions(&state, &mut actions);
        way.push((state, fingerprint(&state), actions));
    };
    for state in model.init_states() {
        seen.insert(fingerprint(&state), true);
        enter(state, &mut way);
    }
    let mut taken: Vec<Action> = Vec::new();
    while let Some((state, print, actions)) = way.last_mut() {
        let Some(action) = actions.pop() else {
            seen.insert(*print, false);
            way.pop();
            taken.pop();
            continue;
        };
        let Some(next) = model.next_state(state, action) else {
            continue;
        };
        match seen.get(&fingerprint(&next)) {
            Some(false) => {}
            Some(true) => {
                taken.push(action);
                let back = way.iter().position(|step| step.0 == next).unwrap_or(0);
                let run = way.iter().map(|step| step.0).zip(taken).collect();
                return Err(Endless { run, back });
            }
            None => {
                seen.insert(fingerprint(&next), true);
                taken.push(action);
                enter(next, &mut way);
            }
        }
    }
    Ok(seen.len())
}
