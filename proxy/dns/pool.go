package dns

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxEntries bounds what a Pool remembers. What was used longest ago is forgotten first.
const maxEntries = 16384

// key is what an address stands for.
type key struct {
	host     string
	endpoint string // ID; empty: the service
}

// entry is one address that was handed out: a number within the Pool's prefixes, or a real address.
type entry struct {
	key
	number  uint32     // 0: the address is real
	address netip.Addr // real
	used    atomic.Int64
}

// Pool gives services and endpoints addresses, and knows whose they are.
type Pool struct {
	// read-only after NewPool
	v4, v6 netip.Prefix
	last   uint32 // the highest number
	limit  int
	now    func() time.Time
	dirty  chan struct{} // something worth keeping has changed

	mu       sync.RWMutex
	next     uint32                // guarded by mu; the number to be tried next
	keys     map[key]*entry        // guarded by mu; those with a number
	numbers  map[uint32]*entry     // guarded by mu; the same
	reals    map[netip.Addr]*entry // guarded by mu
	forgot   uint64                // guarded by mu; how many
	isStored bool                  // guarded by mu: nothing has changed since the last snapshot
}

// NewPool returns an empty Pool. v4 has at most 24 bits, v6, which may be zero for none, at most 96.
func NewPool(v4, v6 netip.Prefix, now func() time.Time) (*Pool, error) {
	if !v4.IsValid() || !v4.Addr().Is4() || v4.Bits() > 24 || v4 != v4.Masked() {
		return nil, fmt.Errorf("%s is not a range of IPv4 addresses with a length of at most 24 bits", v4)
	}
	if v6.IsValid() && (!v6.Addr().Is6() || v6.Addr().Is4In6() || v6.Bits() > 96 || v6 != v6.Masked()) {
		return nil, fmt.Errorf("%s is not a range of IPv6 addresses with a length of at most 96 bits", v6)
	}
	p := &Pool{
		v4: v4, v6: v6, now: now, dirty: make(chan struct{}, 1), isStored: true, next: 1,
		last: uint32(uint64(1)<<(32-v4.Bits()) - 2), // neither the first nor the last address of the range
		keys: map[key]*entry{}, numbers: map[uint32]*entry{}, reals: map[netip.Addr]*entry{},
	}
	p.limit = int(min(maxEntries, p.last/2))
	return p, nil
}

// Assign returns the addresses of a service or endpoint; a new one gets the next that was never, or longest ago, used.
func (p *Pool) Assign(k key) (v4, v6 netip.Addr) {
	p.mu.RLock()
	e := p.keys[k]
	p.mu.RUnlock()
	if e == nil {
		e = p.add(k)
	}
	e.used.Store(p.now().Unix())
	return p.addresses(e.number)
}

func (p *Pool) add(k key) *entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.keys[k]; e != nil {
		return e
	}
	p.makeRoom()
	for p.numbers[p.next] != nil || p.next == 0 || p.next > p.last {
		if p.next++; p.next > p.last {
			p.next = 1
		}
	}
	e := &entry{key: k, number: p.next}
	p.next++
	p.keys[k], p.numbers[e.number] = e, e
	p.changed()
	return e
}

// Note remembers that a real address was given out for an endpoint.
func (p *Pool) Note(address netip.Addr, k key) {
	p.mu.RLock()
	e := p.reals[address]
	p.mu.RUnlock()
	if e == nil || e.key != k {
		p.mu.Lock()
		if p.reals[address] == nil {
			p.makeRoom()
		}
		e = &entry{key: k, address: address}
		p.reals[address] = e
		p.changed()
		p.mu.Unlock()
	}
	e.used.Store(p.now().Unix())
}

// At says what an address stands for. ours reports whether it is of the Pool's ranges, known or not.
func (p *Pool) At(address netip.Addr) (k key, known, ours bool) {
	address = address.Unmap()
	number, ours := p.numberOf(address)
	p.mu.RLock()
	e := p.reals[address]
	if ours {
		e = p.numbers[number]
	}
	p.mu.RUnlock()
	if e == nil {
		return key{}, false, ours
	}
	if now := p.now().Unix(); now != e.used.Load() {
		e.used.Store(now)
	}
	return e.key, true, ours
}

// Size is how many addresses are known, and how many were forgotten for want of room.
func (p *Pool) Size() (known int, forgotten uint64) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return len(p.keys) + len(p.reals), p.forgot
}

// Names says what each known address stands for: a host, with the ID of one endpoint after a space where it is that.
func (p *Pool) Names() map[string]string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	out := make(map[string]string, len(p.keys)+len(p.reals))
	name := func(k key) string {
		if k.endpoint == "" {
			return k.host
		}
		return k.host + " " + k.endpoint
	}
	for k, e := range p.keys {
		v4, _ := p.addresses(e.number)
		out[v4.String()] = name(k)
	}
	for a, e := range p.reals {
		out[a.String()] = name(e.key)
	}
	return out
}

// makeRoom forgets a sixteenth of all where the Pool is full. mu is held.
func (p *Pool) makeRoom() {
	if len(p.keys)+len(p.reals) < p.limit {
		return
	}
	all := make([]*entry, 0, p.limit)
	for _, e := range p.keys {
		all = append(all, e)
	}
	for _, e := range p.reals {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *entry) int { return cmp.Compare(a.used.Load(), b.used.Load()) })
	for _, e := range all[:max(1, len(all)/16)] {
		p.forgot++
		if e.number == 0 {
			delete(p.reals, e.address)
			continue
		}
		delete(p.keys, e.key)
		delete(p.numbers, e.number)
	}
}

// changed is called with mu held.
func (p *Pool) changed() {
	p.isStored = false
	select {
	case p.dirty <- struct{}{}:
	default:
	}
}

func (p *Pool) addresses(number uint32) (v4, v6 netip.Addr) {
	base := p.v4.Addr().As4()
	var out [4]byte
	binary.BigEndian.PutUint32(out[:], binary.BigEndian.Uint32(base[:])+number)
	v4 = netip.AddrFrom4(out)
	if p.v6.IsValid() {
		b := p.v6.Addr().As16()
		binary.BigEndian.PutUint32(b[12:], binary.BigEndian.Uint32(b[12:])+number)
		v6 = netip.AddrFrom16(b)
	}
	return v4, v6
}

func (p *Pool) numberOf(a netip.Addr) (number uint32, ours bool) {
	switch {
	case p.v4.Contains(a):
		have, base := a.As4(), p.v4.Addr().As4()
		return binary.BigEndian.Uint32(have[:]) - binary.BigEndian.Uint32(base[:]), true
	case p.v6.IsValid() && p.v6.Contains(a):
		have, base := a.As16(), p.v6.Addr().As16()
		if [8]byte(have[4:12]) != [8]byte(base[4:12]) {
			return 0, true
		}
		return binary.BigEndian.Uint32(have[12:]) - binary.BigEndian.Uint32(base[12:]), true
	}
	return 0, false
}

// poolFile is the Pool as it is kept.
type poolFile struct {
	Version int         `json:"version"`
	Next    uint32      `json:"next"`
	Entries []poolEntry `json:"entries"`
}

type poolEntry struct {
	Host     string `json:"host"`
	Endpoint string `json:"endpoint,omitempty"`
	Number   uint32 `json:"number,omitempty"`
	Address  string `json:"address,omitempty"`
	Used     int64  `json:"used"` // Unix seconds
}

const poolVersion = 1

// snapshot is what is to be kept, or nil where nothing has changed since the last.
func (p *Pool) snapshot() *poolFile {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isStored {
		return nil
	}
	p.isStored = true
	f := &poolFile{Version: poolVersion, Next: p.next}
	for _, e := range p.keys {
		f.Entries = append(f.Entries, poolEntry{Host: e.host, Endpoint: e.endpoint, Number: e.number, Used: e.used.Load()})
	}
	for a, e := range p.reals {
		f.Entries = append(f.Entries, poolEntry{Host: e.host, Endpoint: e.endpoint, Address: a.String(), Used: e.used.Load()})
	}
	slices.SortFunc(f.Entries, func(a, b poolEntry) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Endpoint, b.Endpoint), cmp.Compare(a.Address, b.Address))
	})
	return f
}

// restore takes what was kept into an empty Pool: all of it, or nothing and an error.
func (p *Pool) restore(f *poolFile) error {
	if f.Version != poolVersion {
		return fmt.Errorf("version is %d, want %d", f.Version, poolVersion)
	}
	if len(f.Entries) > p.limit {
		return fmt.Errorf("entries: %d, at most %d are read", len(f.Entries), p.limit)
	}
	keys, numbers, reals := map[key]*entry{}, map[uint32]*entry{}, map[netip.Addr]*entry{}
	for i, pe := range f.Entries {
		e := &entry{key: key{pe.Host, pe.Endpoint}, number: pe.Number}
		if q := parse(pe.Host+".", ""); q.kind != service || q.host != pe.Host || len(pe.Endpoint) > 64 {
			return fmt.Errorf("entries[%d]: %.100q, endpoint %.100q, is no service of the mesh", i, pe.Host, pe.Endpoint)
		}
		e.used.Store(min(pe.Used, p.now().Unix()))
		if pe.Address != "" {
			a, err := netip.ParseAddr(pe.Address)
			if _, ours := p.numberOf(a); err != nil || a.Zone() != "" || ours || pe.Number != 0 || reals[a] != nil || pe.Endpoint == "" {
				return fmt.Errorf("entries[%d].address: %.100q is no address of an endpoint, or there twice", i, pe.Address)
			}
			e.address, reals[a] = a, e
			continue
		}
		if e.number == 0 || e.number > p.last || numbers[e.number] != nil || keys[e.key] != nil {
			return fmt.Errorf("entries[%d].number: %d is out of the range, or there twice", i, pe.Number)
		}
		keys[e.key], numbers[e.number] = e, e
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.keys)+len(p.reals) > 0 {
		return errors.New("the pool is in use already")
	}
	p.keys, p.numbers, p.reals = keys, numbers, reals
	if p.next = f.Next; f.Next == 0 || f.Next > p.last || f.Next == math.MaxUint32 {
		p.next = 1
	}
	return nil
}
