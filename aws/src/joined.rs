//! Look-ups that join: what one call can describe is never asked for in several. The first one never waits; those that come
//! while it is under way go together with the next call.

use crate::client::Answer;
use crate::error::{AwsError, Class};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use tracing::Instrument as _;

/// DescribeTargetGroups: "You cannot describe more than '20' target groups at a time".
const MOST: usize = 20;

/// Who waits for an answer about what.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    /// A call is under way.
    flies: bool,
    waiting: Vec<Ask<T>>,
}

struct Ask<T> {
    id: String,
    tell: oneshot::Sender<Answer<T>>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { state: Mutex::new(State { flies: false, waiting: Vec::new() }) }
    }
}

impl<T: Clone + Send + 'static> Queue<T> {
    /// Asks for one of several that `call` can describe at once; it gives what it found, by id.
    ///
    /// # Errors
    /// What AWS answered about this one: another one that does not exist fails nobody else.
    pub(crate) async fn ask<F>(
        self: Arc<Self>,
        id: &str,
        call: impl Fn(Vec<String>) -> F + Send + 'static,
    ) -> Answer<T>
    where
        F: Future<Output = Answer<Vec<(String, T)>>> + Send,
    {
        let (tell, told) = oneshot::channel();
        let is_first = {
            let mut state = self.lock();
            state.waiting.push(Ask { id: id.to_owned(), tell });
            !std::mem::replace(&mut state.flies, true)
        };
        if is_first {
            // On its own: whoever asked first may go away, and the others wait for the answer, too.
            tokio::spawn(async move { self.fly(call).await }.in_current_span());
        }
        told.await.unwrap_or_else(|_| Err(failed("InternalError", "the call broke off")))
    }

    /// Calls until nobody waits.
    async fn fly<F>(&self, call: impl Fn(Vec<String>) -> F)
    where
        F: Future<Output = Answer<Vec<(String, T)>>>,
    {
        let broken = BrokenOff(self);
        loop {
            let batch: Vec<Ask<T>> = {
                let mut state = self.lock();
                let count = state.waiting.len().min(MOST);
                state.flies = count > 0;
                state.waiting.drain(..count).collect()
            };
            if batch.is_empty() {
                std::mem::forget(broken);
                return;
            }
            let mut parts = vec![batch];
            while let Some(mut part) = parts.pop() {
                let mut ids: Vec<String> = part.iter().map(|ask| ask.id.clone()).collect();
                ids.sort_unstable();
                ids.dedup();
                match call(ids).await {
                    // One that does not exist fails the call for all of them.
                    Err(error) if part.len() > 1 && is_about_one(&error) => {
                        let half = part.split_off(part.len() / 2);
                        parts.extend([half, part]);
                    }
                    Err(error) => tell(part, |_| Err(error.clone())),
                    Ok(found) => tell(part, |id| {
                        let of_it = found.iter().find(|(known, _)| known == id);
                        let missing = || failed("TargetGroupNotFound", "One or more target groups not found");
                        of_it.map(|(_, value)| value.clone()).ok_or_else(missing)
                    }),
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Should a call panic, those that wait hear of it, and the next one calls anew.
struct BrokenOff<'a, T>(&'a Queue<T>);

impl<T> Drop for BrokenOff<'_, T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.flies = false;
        state.waiting.clear();
    }
}

fn tell<T>(part: Vec<Ask<T>>, answer: impl Fn(&str) -> Answer<T>) {
    for ask in part {
        // Whoever asked may not wait any more.
        let _ = ask.tell.send(answer(&ask.id));
    }
}

/// Whether a call may go through without one of those that it asks for.
fn is_about_one(error: &AwsError) -> bool {
    error.class() == Class::Terminal && !error.is_access_denied()
}

fn failed(code: &str, message: &str) -> AwsError {
    AwsError { operation: "DescribeTargetGroups", code: code.to_owned(), message: message.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a fake AWS was asked, in its order.
    type Calls = Arc<Mutex<Vec<Vec<String>>>>;

    fn ids(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|n| format!("{n:03}")).collect()
    }

    /// Asks an AWS where these do not exist: for the first, and for the others while that call is under way.
    async fn all(wanted: Vec<String>, missing: &'static [&'static str]) -> (Vec<Answer<String>>, Calls) {
        let (queue, calls) = (Arc::new(Queue::<String>::default()), Calls::default());
        let (open, opened) = tokio::sync::watch::channel(false);
        let ask = |id: &String| {
            let (queue, calls, opened, id) =
                (Arc::clone(&queue), Arc::clone(&calls), opened.clone(), id.clone());
            let call = move |ids: Vec<String>| {
                calls.lock().unwrap().push(ids.clone());
                let mut opened = opened.clone();
                async move {
                    opened.wait_for(|open| *open).await.unwrap();
                    match ids.iter().any(|id| missing.contains(&id.as_str())) {
                        true => Err(failed("TargetGroupNotFound", "")),
                        false => Ok(ids.into_iter().map(|id| (id.clone(), format!("group {id}"))).collect()),
                    }
                }
            };
            tokio::spawn(async move { queue.ask(&id, call).await })
        };
        let mut asks = vec![ask(&wanted[0])];
        while calls.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        asks.extend(wanted.iter().skip(1).map(ask));
        while queue.lock().waiting.len() + 1 < wanted.len() {
            tokio::task::yield_now().await;
        }
        open.send(true).unwrap();
        let mut answers = Vec::new();
        for ask in asks {
            answers.push(ask.await.unwrap());
        }
        (answers, calls)
    }

    #[tokio::test]
    async fn the_first_goes_at_once_and_those_that_come_meanwhile_go_together() {
        let (answers, calls) = all(ids(0..42), &[]).await;
        assert!(answers.iter().zip(ids(0..42)).all(|(answer, id)| *answer == Ok(format!("group {id}"))));
        let sizes: Vec<usize> = calls.lock().unwrap().iter().map(Vec::len).collect();
        assert_eq!(sizes, [1, 20, 20, 1]);
    }

    #[tokio::test]
    async fn one_that_does_not_exist_fails_nobody_else() {
        let (answers, calls) = all(ids(0..21), &["013"]).await;
        for (answer, id) in answers.iter().zip(ids(0..21)) {
            match id.as_str() {
                "013" => assert!(answer.as_ref().is_err_and(AwsError::is_target_group_not_found)),
                _ => assert_eq!(*answer, Ok(format!("group {id}"))),
            }
        }
        // Alone, together, and then halves: 10, 5, 3, 2, 1 and their others.
        let calls = calls.lock().unwrap().len();
        assert!(calls <= 2 + 2 * 5, "{calls} calls");
    }

    #[tokio::test]
    async fn several_that_ask_for_the_same_ask_once() {
        let (answers, calls) = all(vec!["001".to_owned(); 10], &[]).await;
        assert!(answers.iter().all(|answer| *answer == Ok("group 001".to_owned())));
        assert_eq!(*calls.lock().unwrap(), [["001"], ["001"]]);
    }

    #[tokio::test]
    async fn a_call_that_panics_fails_its_own_and_no_later_one() {
        let queue = Arc::new(Queue::<String>::default());
        let ask = |panics: bool| {
            Arc::clone(&queue).ask("001", move |ids| async move {
                assert!(!panics, "as meant");
                Ok(ids.into_iter().map(|id| (id.clone(), id)).collect())
            })
        };
        assert_eq!(ask(true).await.unwrap_err().code, "InternalError");
        assert_eq!(ask(false).await, Ok("001".to_owned()));
    }
}
