package http2

import (
	"hash/maphash"
	"strconv"
	"strings"
)

// encoder compresses heads (RFC 7541). A value enters the table when it is sent a second time in a row, or to give its name an index:
// what changes with each message would only push out what does not. Strings are not Huffman-coded: that costs both ends more than
// it saves them.
type encoder struct {
	b []byte // the block under way

	limit, least uint32 // of the table; the least that limit was since the last block
	size         uint32
	resized      bool
	sizes        [defaultTableSize / entryOverhead]uint32 // of the entries, by their numbers
	inserted     uint64                                   // entries so far; the newest has this number
	evicted      uint64

	seed  maphash.Seed
	names map[string]*fieldName
	at    int          // which field of the block comes
	order []*fieldName // of the block before: most are alike
}

// fieldName is what is known of a name.
type fieldName struct {
	name   string
	static uint64   // its index in the static table, 0: none
	values []string // of the static table, from there on
	secret bool     // must not be guessed by size (RFC 7541 §7.1)
	last   uint64   // hash of the value sent last
	sent   bool
	entry  uint64 // number of its newest entry, 0: none
	value  string // of that
}

const (
	entryOverhead = 32
	maxNames      = 128 // that are remembered
	maxBlock      = 64  // fields whose order is remembered
	staticEntries = 61
)

func (e *encoder) init() {
	e.limit, e.least = defaultTableSize, defaultTableSize
	e.seed, e.names = maphash.MakeSeed(), map[string]*fieldName{}
}

// resize obeys the peer's SETTINGS_HEADER_TABLE_SIZE.
func (e *encoder) resize(limit uint32) {
	if limit = min(limit, defaultTableSize); limit != e.limit {
		e.limit, e.least, e.resized = limit, min(e.least, limit), true
		e.evict(limit)
	}
}

// begin starts a block.
func (e *encoder) begin() {
	e.b, e.at = e.b[:0], 0
	if !e.resized {
		return
	}
	if e.least < e.limit { // it was smaller meanwhile. Some decoders take a second update only of an empty table
		e.evict(0)
		e.integer(0x20, 5, 0)
	}
	e.integer(0x20, 5, uint64(e.limit))
	e.least, e.resized = e.limit, false
}

// integer is RFC 7541 §5.1.
func (e *encoder) integer(high byte, bits uint, n uint64) {
	most := uint64(1)<<bits - 1
	if n < most {
		e.b = append(e.b, high|byte(n))
		return
	}
	e.b = append(e.b, high|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		e.b = append(e.b, byte(n)|0x80)
	}
	e.b = append(e.b, byte(n))
}

func (e *encoder) text(s string) {
	e.integer(0, 7, uint64(len(s)))
	e.b = append(e.b, s...)
}

// field adds a field.
func (e *encoder) field(name, value string) {
	k := e.nameOf(name)
	if k == nil {
		e.literal(0, 4, 0, name, value)
		return
	}
	for i := range k.values {
		if k.values[i] == value && value != "" {
			e.integer(0x80, 7, k.static+uint64(i))
			return
		}
	}
	index := k.static
	if k.entry > e.evicted {
		dynamic := staticEntries + 1 + e.inserted - k.entry
		if k.value == value && !k.secret {
			e.integer(0x80, 7, dynamic)
			return
		}
		if index == 0 {
			index = dynamic
		}
	}
	if k.secret {
		e.literal(0x10, 4, index, name, value)
		return
	}
	sum := maphash.String(e.seed, value)
	again := k.sent && k.last == sum
	k.sent, k.last = true, sum
	if size := uint32(len(name) + len(value) + entryOverhead); (again || index == 0) && size <= e.limit/4 {
		e.literal(0x40, 6, index, name, value)
		e.insert(k, value, size)
		return
	}
	e.literal(0, 4, index, name, value)
}

// number adds a field whose value is one, with a name of the static table.
func (e *encoder) number(index uint64, n int64) {
	e.integer(0, 4, index)
	at := len(e.b)
	e.b = append(e.b, 0)
	e.b = strconv.AppendInt(e.b, n, 10)
	e.b[at] = byte(len(e.b) - at - 1)
}

const (
	indexStatus = 8
	indexLength = 28
)

// status adds :status.
func (e *encoder) status(n int) {
	switch n {
	case 200:
		e.b = append(e.b, 0x80|indexStatus)
	case 304:
		e.b = append(e.b, 0x80|indexStatus+3)
	case 404:
		e.b = append(e.b, 0x80|indexStatus+5)
	default:
		e.number(indexStatus, int64(n))
	}
}

func (e *encoder) literal(high byte, bits uint, index uint64, name, value string) {
	e.integer(high, bits, index)
	if index == 0 {
		e.text(name)
	}
	e.text(value)
}

// nameOf is nil for a name beyond maxNames.
func (e *encoder) nameOf(name string) *fieldName {
	at := e.at
	e.at++
	if at < len(e.order) {
		if k := e.order[at]; k.name == name {
			return k
		}
	}
	k := e.names[name]
	if k == nil {
		if len(e.names) == maxNames {
			return nil
		}
		k = &fieldName{name: strings.Clone(name)}
		k.static, k.values = staticName(name)
		switch name {
		case "authorization", "proxy-authorization", "cookie", "set-cookie":
			k.secret = true
		}
		e.names[k.name] = k
	}
	switch {
	case at < len(e.order):
		e.order[at] = k
	case at == len(e.order) && at < maxBlock:
		e.order = append(e.order, k)
	}
	return k
}

func (e *encoder) insert(k *fieldName, value string, size uint32) {
	e.evict(e.limit - size)
	e.inserted++
	e.sizes[e.inserted%uint64(len(e.sizes))] = size
	e.size += size
	k.entry, k.value = e.inserted, strings.Clone(value) // not the head that it is part of
}

// evict makes the table no larger than limit.
func (e *encoder) evict(limit uint32) {
	for e.size > limit {
		e.evicted++
		e.size -= e.sizes[e.evicted%uint64(len(e.sizes))]
	}
}

// staticName finds a name in the static table (RFC 7541 appendix A), and the values that it has there.
func staticName(name string) (index uint64, values []string) {
	for i := range staticTable {
		if staticTable[i].name == name {
			return staticTable[i].index, staticTable[i].values
		}
	}
	return 0, nil
}

var staticTable = func() (table []struct {
	name   string
	index  uint64
	values []string
}) {
	index := uint64(1)
	for line := range strings.Lines(staticNames) {
		name, values, some := strings.Cut(strings.TrimSpace(line), "|")
		entry := struct {
			name   string
			index  uint64
			values []string
		}{name: name, index: index}
		if some {
			entry.values = strings.Split(values, "|")
		}
		index += uint64(max(1, len(entry.values)))
		table = append(table, entry)
	}
	return table
}()

const staticNames = `:authority
:method|GET|POST
:path|/|/index.html
:scheme|http|https
:status|200|204|206|304|400|404|500
accept-charset
accept-encoding|gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate`
