//! The language of nf_tables, as linux/netfilter/nf_tables.h defines it: tables, chains, sets, rules and their expressions.
//!
//! Attributes are integers in the network's order, values that packets are compared with stand as they stand in the packet, and what the
//! kernel knows by itself (indexes, groups, states) as integers of this machine.

use rustix::io::Errno;
use rustix::net::netlink;

use super::netlink::{Attributes, Message, Refused, Socket};

/// `struct nfgenmsg`.
pub(super) const GENERAL_BYTES: usize = 4;
/// Longest comment of a rule that is kept: the kernel takes 256 bytes of user data, of which two tell type and length.
const COMMENT_BYTES_MAX: usize = 128;
/// Bits of a connection's state (`ct state`).
pub(super) const ESTABLISHED: u32 = 2;
pub(super) const RELATED: u32 = 4;
pub(super) const NEW: u32 = 8;
/// Bit of a connection's status: its destination was changed.
pub(super) const DESTINATION_CHANGED: u32 = 1 << 5;
/// What the kernel drops, or lets pass, at the end of a base chain.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

// Attributes of nf_tables.h, by their numbers.
const LIST_ELEM: u16 = 1;
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LEN: u16 = 7;
const SET_DESC: u16 = 9;
const SET_ID: u16 = 10;
const SET_USERDATA: u16 = 13;
const SET_DESC_SIZE: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS_LIST: u16 = 3;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
/// A register of 16 bytes; in units of four bytes it is [`FIRST_WORD`] and the three behind it.
pub(super) const REGISTER: u32 = libc::NFT_REG_1 as u32;
const FIRST_WORD: u32 = libc::NFT_REG32_00 as u32;

/// The word of a key that begins after so many words.
pub(super) const fn word(number: u32) -> u32 {
    FIRST_WORD + number
}

/// A family of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// IPv4 and IPv6 together.
    Inet,
    /// IPv4.
    Ip,
}

impl Family {
    fn number(self) -> u8 {
        (match self {
            Self::Inet => libc::NFPROTO_INET,
            Self::Ip => libc::NFPROTO_IPV4,
        }) as u8
    }
}

/// Where a packet's bytes are counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    Link,
    Network,
    Transport,
}

/// What the kernel knows of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meta {
    /// Index of the interface that it came by.
    In,
    /// Name of that, filled up to 16 bytes.
    InName,
    OutName,
    InGroup,
    OutGroup,
    /// Kind of hardware of the interface that it came by.
    InKind,
    /// One byte: the family, `NFPROTO_*`.
    Family,
    /// One byte: the protocol behind the IP header.
    Protocol,
}

/// What the kernel knows of a packet's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connection {
    State,
    Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    Unequal,
    AtMost,
    AtLeast,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    /// Back to the chain that led here.
    Return,
    /// On in another chain, and back here at its end.
    Jump(String),
}

/// One step of a rule. Where none is named, it reads and writes [`REGISTER`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expression {
    Meta {
        key: Meta,
        to: u32,
    },
    Connection(Connection),
    Payload {
        base: Base,
        offset: u32,
        bytes: u32,
        to: u32,
    },
    /// The bits that are one here remain.
    Mask(Vec<u8>),
    Compare(Comparison, Vec<u8>),
    /// Goes on if the key, from [`REGISTER`] on, is in the set; if it is not, where `inverted`.
    Lookup {
        set: &'static str,
        inverted: bool,
    },
    /// The verdict of the key, from [`REGISTER`] on, in a map.
    Map {
        set: &'static str,
    },
    /// `RTN_*` of the destination.
    DestinationKind,
    Counter,
    /// Tells the sender: administratively prohibited.
    Reject,
    /// The address of the interface that it leaves by.
    Masquerade,
    /// Notes the connection under the key; goes on if there are more than so many.
    MoreConnectionsThan {
        set: &'static str,
        count: u32,
    },
    Verdict(Verdict),
}

impl Expression {
    fn encode(&self, list: &mut Message) {
        let mut expression = |name: &str, data: &dyn Fn(&mut Message)| {
            list.nest(LIST_ELEM, |element| element_of(element, name, data));
        };
        match self {
            Self::Meta { key, to } => expression("meta", &|data| {
                data.big(1, *to);
                data.big(2, meta_number(*key));
            }),
            Self::Connection(key) => expression("ct", &|data| {
                data.big(1, REGISTER);
                data.big(
                    2,
                    match key {
                        Connection::State => libc::NFT_CT_STATE,
                        Connection::Status => libc::NFT_CT_STATUS,
                    } as u32,
                );
            }),
            Self::Payload { base, offset, bytes, to } => expression("payload", &|data| {
                data.big(1, *to);
                data.big(2, *base as u32);
                data.big(3, *offset);
                data.big(4, *bytes);
            }),
            Self::Mask(mask) => expression("bitwise", &|data| {
                data.big(1, REGISTER);
                data.big(2, REGISTER);
                data.big(3, mask.len() as u32);
                data.nest(4, |value| value.attribute(DATA_VALUE, mask));
                data.nest(5, |value| value.attribute(DATA_VALUE, &vec![0; mask.len()]));
            }),
            Self::Compare(comparison, value) => expression("cmp", &|data| {
                data.big(1, REGISTER);
                data.big(2, comparison_number(*comparison));
                data.nest(3, |data| data.attribute(DATA_VALUE, value));
            }),
            Self::Lookup { set, inverted } => expression("lookup", &|data| {
                data.text(1, set);
                data.big(2, REGISTER);
                data.big(5, u32::from(*inverted));
            }),
            Self::Map { set } => expression("lookup", &|data| {
                data.text(1, set);
                data.big(2, REGISTER);
                data.big(3, libc::NFT_REG_VERDICT as u32);
            }),
            Self::DestinationKind => expression("fib", &|data| {
                data.big(1, REGISTER);
                // NFT_FIB_RESULT_ADDRTYPE of NFTA_FIB_F_DADDR.
                data.big(2, 3);
                data.big(3, 2);
            }),
            Self::Counter => expression("counter", &|data| {
                data.attribute(1, &[0; 8]);
                data.attribute(2, &[0; 8]);
            }),
            Self::Reject => expression("reject", &|data| {
                data.big(1, libc::NFT_REJECT_ICMPX_UNREACH as u32);
                data.attribute(2, &[libc::NFT_REJECT_ICMPX_ADMIN_PROHIBITED as u8]);
            }),
            Self::Masquerade => expression("masq", &|_| {}),
            Self::MoreConnectionsThan { set, count } => expression("dynset", &|data| {
                data.text(1, set);
                data.big(3, libc::NFT_DYNSET_OP_ADD as u32);
                data.big(4, REGISTER);
                data.nest(7, |limit| {
                    element_of(limit, "connlimit", &|data| {
                        data.big(1, *count);
                        // NFT_CONNLIMIT_F_INV: more than.
                        data.big(2, 1);
                    });
                });
            }),
            Self::Verdict(verdict) => expression("immediate", &|data| {
                data.big(1, libc::NFT_REG_VERDICT as u32);
                data.nest(2, |value| put_verdict(value, verdict));
            }),
        }
    }
}

fn element_of(element: &mut Message, name: &str, data: &dyn Fn(&mut Message)) {
    element.text(EXPR_NAME, name);
    element.nest(EXPR_DATA, |inner| data(inner));
}

fn put_verdict(value: &mut Message, verdict: &Verdict) {
    value.nest(DATA_VERDICT, |inner| {
        let code = match verdict {
            Verdict::Accept => ACCEPT,
            Verdict::Drop => DROP,
            Verdict::Return => libc::NFT_RETURN.cast_unsigned(),
            Verdict::Jump(_) => libc::NFT_JUMP.cast_unsigned(),
        };
        inner.big(VERDICT_CODE, code);
        if let Verdict::Jump(chain) = verdict {
            inner.text(VERDICT_CHAIN, chain);
        }
    });
}

fn meta_number(key: Meta) -> u32 {
    (match key {
        Meta::In => libc::NFT_META_IIF,
        Meta::InName => libc::NFT_META_IIFNAME,
        Meta::OutName => libc::NFT_META_OIFNAME,
        Meta::InGroup => libc::NFT_META_IIFGROUP,
        Meta::OutGroup => libc::NFT_META_OIFGROUP,
        Meta::InKind => libc::NFT_META_IIFTYPE,
        Meta::Family => libc::NFT_META_NFPROTO,
        Meta::Protocol => libc::NFT_META_L4PROTO,
    }) as u32
}

fn comparison_number(comparison: Comparison) -> u32 {
    (match comparison {
        Comparison::Equal => libc::NFT_CMP_EQ,
        Comparison::Unequal => libc::NFT_CMP_NEQ,
        Comparison::AtMost => libc::NFT_CMP_LTE,
        Comparison::AtLeast => libc::NFT_CMP_GTE,
    }) as u32
}

/// When a base chain is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hook {
    /// `filter` or `nat`.
    pub(super) kind: &'static str,
    /// `NF_INET_*`.
    pub(super) number: i32,
    /// The lower, the earlier.
    pub(super) priority: i32,
}

/// Types of keys by the numbers that nft(8) knows them by.
pub(super) const ADDRESS: u32 = 7;
pub(super) const HARDWARE_ADDRESS: u32 = 9;
pub(super) const INDEX: u32 = 20;

/// A set or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) name: &'static str,
    /// The types of the key's parts, for those who read the table with nft(8): its `TYPE_*`.
    pub(super) types: &'static [u32],
    pub(super) key_bytes: u32,
    pub(super) kind: SetKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SetKind {
    Plain,
    /// Elements are the ends of ranges.
    Ranges,
    /// The value is a verdict.
    Verdicts,
    /// Rules add to it, up to this size.
    Counted(u32),
}

/// An element of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) key: Vec<u8>,
    pub(super) verdict: Option<Verdict>,
    /// The first address behind a range.
    pub(super) is_end: bool,
}

impl Element {
    pub(super) fn of(key: Vec<u8>) -> Self {
        Self { key, verdict: None, is_end: false }
    }
}

/// A table, by which messages about what is in it are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) family: Family,
    pub(super) name: String,
}

impl Table {
    fn message(&self, kind: i32, flags: i32) -> Message {
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
        Message::new(kind, flags).fixed(&[self.family.number(), 0, 0, 0])
    }

    pub(super) fn add(&self) -> Message {
        self.message(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE).with_text(TABLE_NAME, &self.name)
    }

    /// Asks for it. `ENOENT` if there is none.
    pub(super) fn ask_for(&self) -> Message {
        self.message(libc::NFT_MSG_GETTABLE, 0).with_text(TABLE_NAME, &self.name)
    }

    /// With all that is in it. `ENOENT` if there is none.
    pub(super) fn delete(&self) -> Message {
        self.message(libc::NFT_MSG_DELTABLE, 0).with_text(TABLE_NAME, &self.name)
    }

    /// A chain that packets come to by jumps, or from a hook; then it accepts what no rule decides.
    pub(super) fn add_chain(&self, name: &str, hook: Option<Hook>) -> Message {
        let mut message = self
            .message(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_CREATE)
            .with_text(CHAIN_TABLE, &self.name)
            .with_text(CHAIN_NAME, name);
        if let Some(hook) = hook {
            message.text(CHAIN_TYPE, hook.kind);
            message.big(CHAIN_POLICY, ACCEPT);
            message.nest(CHAIN_HOOK, |inner| {
                inner.big(HOOK_NUMBER, hook.number.cast_unsigned());
                inner.big(HOOK_PRIORITY, hook.priority.cast_unsigned());
            });
        }
        message
    }

    pub(super) fn delete_chain(&self, name: &str) -> Message {
        self.message(libc::NFT_MSG_DELCHAIN, 0).with_text(CHAIN_TABLE, &self.name).with_text(CHAIN_NAME, name)
    }

    /// All rules of a chain go.
    pub(super) fn flush_chain(&self, name: &str) -> Message {
        self.message(libc::NFT_MSG_DELRULE, 0).with_text(RULE_TABLE, &self.name).with_text(RULE_CHAIN, name)
    }

    /// A rule at the end of a chain.
    pub(super) fn append(&self, chain: &str, rule: &[Expression]) -> Message {
        self.rule(libc::NLM_F_CREATE | libc::NLM_F_APPEND, chain, rule)
    }

    /// A rule at the beginning of a chain, with a comment that iptables and nft show.
    pub(super) fn insert(&self, chain: &str, rule: &[Expression], comment: &str) -> Message {
        let comment = &comment.as_bytes()[..comment.len().min(COMMENT_BYTES_MAX)];
        // One piece of user data: type 0 is a comment, then the length, with a NUL at the end.
        let mut data = vec![0, comment.len() as u8 + 1];
        data.extend_from_slice(comment);
        data.push(0);
        self.rule(libc::NLM_F_CREATE, chain, rule).with(RULE_USERDATA, &data)
    }

    fn rule(&self, flags: i32, chain: &str, rule: &[Expression]) -> Message {
        self.message(libc::NFT_MSG_NEWRULE, flags)
            .with_text(RULE_TABLE, &self.name)
            .with_text(RULE_CHAIN, chain)
            .with_nest(RULE_EXPRESSIONS, |list| rule.iter().for_each(|expression| expression.encode(list)))
    }

    pub(super) fn delete_rule(&self, chain: &str, handle: u64) -> Message {
        self.message(libc::NFT_MSG_DELRULE, 0)
            .with_text(RULE_TABLE, &self.name)
            .with_text(RULE_CHAIN, chain)
            .with(RULE_HANDLE, &handle.to_be_bytes())
    }

    /// `number` is any that no other set of the transaction has.
    pub(super) fn add_set(&self, set: &Set, number: u32) -> Message {
        let flags = match set.kind {
            SetKind::Plain => 0,
            SetKind::Ranges => libc::NFT_SET_INTERVAL,
            SetKind::Verdicts => libc::NFT_SET_MAP,
            SetKind::Counted(_) => libc::NFT_SET_EVAL,
        };
        let mut message = self
            .message(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE)
            .with_text(SET_TABLE, &self.name)
            .with_text(SET_NAME, set.name);
        message.big(SET_FLAGS, flags as u32);
        message.big(SET_KEY_TYPE, set.types.iter().fold(0, |all, kind| all << 6 | kind));
        message.big(SET_KEY_LEN, set.key_bytes);
        message.big(SET_ID, number);
        if set.types == [INDEX] {
            // For nft(8): a piece of user data of type 0 with four bytes, whose 1 says that keys have this machine's order.
            let order = 1_u32.to_ne_bytes();
            message.attribute(SET_USERDATA, &[&[0, 4][..], &order].concat());
        }
        if set.kind == SetKind::Verdicts {
            message.big(SET_DATA_TYPE, libc::NFT_DATA_VERDICT);
            message.big(SET_DATA_LEN, 0);
        }
        if let SetKind::Counted(size) = set.kind {
            message.nest(SET_DESC, |description| description.big(SET_DESC_SIZE, size));
        }
        message
    }

    pub(super) fn add_elements(&self, set: &str, elements: &[Element]) -> Message {
        self.elements(libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, set, elements)
    }

    pub(super) fn delete_elements(&self, set: &str, elements: &[Element]) -> Message {
        self.elements(libc::NFT_MSG_DELSETELEM, 0, set, elements)
    }

    fn elements(&self, kind: i32, flags: i32, set: &str, elements: &[Element]) -> Message {
        self.message(kind, flags).with_text(ELEMENTS_TABLE, &self.name).with_text(ELEMENTS_SET, set).with_nest(
            ELEMENTS_LIST,
            |list| {
                for element in elements {
                    list.nest(LIST_ELEM, |inner| {
                        if element.is_end {
                            inner.big(ELEMENT_FLAGS, libc::NFT_SET_ELEM_INTERVAL_END as u32);
                        }
                        inner.nest(ELEMENT_KEY, |key| key.attribute(DATA_VALUE, &element.key));
                        if let Some(verdict) = &element.verdict {
                            inner.nest(ELEMENT_DATA, |value| put_verdict(value, verdict));
                        }
                    });
                }
            },
        )
    }
}

/// Opens the socket by which the kernel's packet filter is changed.
pub(super) fn open() -> Result<Socket, Errno> {
    Socket::open(Some(netlink::NETFILTER))
}

/// Carries out all changes or none.
pub(super) fn transact(socket: &mut Socket, changes: Vec<Message>) -> Result<(), Refused> {
    // res_id of the marks names the subsystem.
    let mark = |kind: i32| {
        let [high, low] = (libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes();
        Message::new(kind as u16, 0).fixed(&[0, 0, high, low])
    };
    let mut messages = Vec::with_capacity(changes.len() + 2);
    messages.push(mark(libc::NFNL_MSG_BATCH_BEGIN));
    messages.extend(changes);
    messages.push(mark(libc::NFNL_MSG_BATCH_END));
    // Counted without the mark.
    socket.transact(messages).map_err(|refused| Refused { index: refused.index.saturating_sub(1), ..refused })
}

/// A chain that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) name: String,
    /// Number of the hook, for a base chain.
    pub(super) hook: Option<u32>,
    /// Drops what no rule decides.
    pub(super) drops: bool,
}

/// All chains of all tables.
pub(super) fn chains(socket: &mut Socket) -> Result<Vec<Chain>, Errno> {
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_GETCHAIN) as u16;
    let mut all = Vec::new();
    socket.dump(&Message::new(kind, 0).fixed(&[libc::NFPROTO_UNSPEC as u8, 0, 0, 0]), |_, body| {
        let attributes = Attributes::after(GENERAL_BYTES, body);
        if let (Some(family), Some(table), Some(name)) =
            (body.first(), attributes.text(CHAIN_TABLE), attributes.text(CHAIN_NAME))
        {
            all.push(Chain {
                family: *family,
                table: table.to_owned(),
                name: name.to_owned(),
                hook: attributes.get(CHAIN_HOOK).and_then(|hook| Attributes::new(hook).big(HOOK_NUMBER)),
                drops: attributes.big(CHAIN_POLICY) == Some(DROP),
            });
        }
    })?;
    Ok(all)
}

/// A rule that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) handle: u64,
    pub(super) comment: Option<String>,
}

/// The rules of a chain, from the first on.
pub(super) fn rules(socket: &mut Socket, table: &Table, chain: &str) -> Result<Vec<Rule>, Errno> {
    let asked = table.message(libc::NFT_MSG_GETRULE, 0).with_text(RULE_TABLE, &table.name).with_text(RULE_CHAIN, chain);
    let mut all = Vec::new();
    socket.dump(&asked, |_, body| {
        let attributes = Attributes::after(GENERAL_BYTES, body);
        if let Some(handle) = attributes.get(RULE_HANDLE).and_then(|bytes| bytes.first_chunk()) {
            all.push(Rule { handle: u64::from_be_bytes(*handle), comment: attributes.get(RULE_USERDATA).and_then(comment) });
        }
    })?;
    Ok(all)
}

/// The comment among a rule's user data.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned());
        }
        data = &rest[value.len()..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_found_among_user_data() {
        for (data, expect) in [
            (&b"\0\x03ab\0"[..], Some("ab")),
            (b"\x01\x02xx\0\x03ab\0", Some("ab")),
            (b"\x01\x02xx", None),
            (b"\0\x09ab\0", None),
            (b"\0", None),
            (b"", None),
        ] {
            assert_eq!(comment(data).as_deref(), expect, "{data:?}");
        }
    }
}
