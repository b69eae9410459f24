//! What the daemon may ask for. The messages' own bounds were checked by their codec; here it is checked whether they fit what there is.

use std::os::fd::AsFd;

use rustix::fs::FileType;

use super::layers::{commit, refusal};
use super::networks::Start;
use super::{Keeper, Requester};
use crate::fds::Fds;
use crate::protocol::{Refusal, Reply, Request};
use crate::step::StepError;

impl Keeper {
    pub(super) fn handle(&mut self, from: Requester, request: Request, mut descriptors: Fds) {
        match request {
            Request::Hello => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.greeted = true;
                }
                let data_id = self.data.id.clone();
                self.reply(from, &Reply::Welcome { data_id }, &[]);
                if let Some(grace_ms) = self.grace_left_ms() {
                    self.event(&Reply::Stop { grace_ms });
                }
            }
            Request::Ready => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.ready = true;
                }
                self.respawn.deaths = 0;
                self.reply(from, &Reply::Done, &[]);
                self.announceable = true;
                self.announce();
            }
            Request::OpenRevision { revision, function, title, spec } => {
                self.open_revision(from, revision, function, &title, &spec);
            }
            Request::EndRevision { revision } => self.end_revision(from, revision),
            Request::Start { instance, revision, descriptor } => {
                self.start(Start { requester: from, id: instance, revision, descriptor, descriptors });
            }
            Request::Signal { instance, signal } => self.signal(from, instance, signal.number().into()),
            Request::MoreSockets { instance } => match (self.zygote_of(instance), descriptors.take(0)) {
                (Some(zygote), Some(daemon)) => match rustix::fs::fstat(&daemon) {
                    Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Socket => {
                        self.more_sockets(from, zygote, instance, &daemon);
                    }
                    Ok(_) => self.refuse(from, Refusal::Malformed("the descriptor is no socket".to_owned())),
                    Err(errno) => self.refuse(from, refusal(StepError { step: "look at a descriptor", errno })),
                },
                _ => self.refuse(from, Refusal::NoInstance),
            },
            Request::Exec { exec, instance, spec } => self.exec(from, exec, instance, spec, descriptors),
            Request::SignalExec { exec, signal } => self.signal_exec(from, exec, signal.number().into()),
            Request::List => self.list(from),
            Request::AcknowledgeExit { instance } => self.acknowledge(from, instance),
            Request::CommitLayer { layer } => {
                let committed = match descriptors.take(0) {
                    Some(file) => commit(self.data.layers.as_fd(), layer, &file, self.mode.daemon().uid),
                    None => Err(Refusal::Malformed("the layer's file is missing".to_owned())),
                };
                match committed {
                    Ok(()) => {
                        self.unpack_ahead(layer);
                        self.reply(from, &Reply::Done, &[]);
                    }
                    Err(refused) => self.refuse(from, refused),
                }
            }
        }
    }

    fn refuse(&mut self, to: Requester, refused: Refusal) {
        self.reply(to, &Reply::Refused(refused), &[]);
    }

    /// What is left of the time to drain, if the keeper is asked to stop.
    fn grace_left_ms(&self) -> Option<u32> {
        let since = self.stopping?;
        Some(super::STOP_GRACE.saturating_sub(since.elapsed()).as_millis() as u32)
    }
}
