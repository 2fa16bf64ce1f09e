package peering

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/join"
)

// Errors to branch on.
var (
	ErrAlreadyInMesh = errors.New("this cluster is already in a mesh with others")
	ErrNoSuchMember  = errors.New("no such member")
	ErrNothingHeld   = errors.New("nothing is held back")
	ErrNobodyTold    = errors.New("no member could be told")
	ErrNeedsForce    = errors.New("only the member itself leaves without force")
)

const (
	leavingKey = "mesh/v1/leaving" // a leave has begun; its value is the member record to be left
	tellTime   = 5 * time.Second   // for one member to be told of a leave
	syncTime   = 10 * time.Second  // for the first sync after a join, after which it goes on in the background
)

// Progress is what a long operation tells while it runs: a Step, or a Check.
type Progress struct {
	Step  string
	Check *join.Check
}

// JoinResult is what came of a join.
type JoinResult struct {
	Mesh        string
	Through     string // name of the issuer
	TrustDomain string // of the issuer
	Members     []string
	Accepts     []string // what is believed of each member, in words
	Imports     int      // services
	Exports     int      // services
}

// ready waits until the stores have been read.
func (m *Mesh) ready(ctx context.Context) error {
	select {
	case <-m.loaded:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("federation is still starting: %w", ctx.Err())
	}
}

// CreateToken makes a mesh token with which the cluster named forName may join until life (0: 15 minutes) from now.
func (m *Mesh) CreateToken(ctx context.Context, forName string, life time.Duration) (token string, expires time.Time, err error) {
	if err := m.ready(ctx); err != nil {
		return "", time.Time{}, err
	}
	b := m.book.Load()
	if b.Own().Standing == federation.Joining {
		return "", time.Time{}, errors.New("this cluster is itself joining a mesh: finish that first")
	}
	for id, e := range b.Entries {
		if e.Record.Name == forName && (e.Live() || id == b.Self) {
			return "", time.Time{}, fmt.Errorf("cluster name %q is already held by member %.8s", forName, id)
		}
	}
	t, err := m.join.CreateToken(ctx, forName, life)
	if err != nil {
		return "", time.Time{}, err
	}
	return t.Encode(), t.Expires, nil
}

// dialIssuer connects to the issuer of a token and lets it probe this cluster until done is called.
func (m *Mesh) dialIssuer(ctx context.Context, token string) (c *join.Client, done func(), err error) {
	if err := m.ready(ctx); err != nil {
		return nil, nil, err
	}
	t, err := join.DecodeToken(token)
	if err != nil {
		return nil, nil, err
	}
	c, err = join.Dial(ctx, join.ClientConfig{Source: m.cfg.Source, Dial: m.cfg.Dial, Now: m.cfg.Now}, t)
	if err != nil {
		return nil, nil, err
	}
	if c.Issuer == m.td {
		c.Close()
		return nil, nil, fmt.Errorf("this token was made by this cluster, or by one of the same trust domain %s: run the join on another cluster", m.td)
	}
	m.provisionalMu.Lock()
	m.provisional[c.Issuer] = c.Bundle
	m.provisionalMu.Unlock()
	return c, func() {
		c.Close()
		m.provisionalMu.Lock()
		delete(m.provisional, c.Issuer)
		m.provisionalMu.Unlock()
	}, nil
}

func (m *Mesh) provisionalBundle(td spiffeid.TrustDomain) *spiffebundle.Bundle {
	m.provisionalMu.Lock()
	defer m.provisionalMu.Unlock()
	return m.provisional[td]
}

// Preview finds what a join with this token would, on both sides, and changes nothing. A failed check is a *join.CheckError beside the result.
func (m *Mesh) Preview(ctx context.Context, token string, progress func(Progress)) (*join.Preview, error) {
	c, done, err := m.dialIssuer(ctx, token)
	if err != nil {
		return nil, err
	}
	defer done()
	return m.preview(ctx, c, progress)
}

func (m *Mesh) preview(ctx context.Context, c *join.Client, progress func(Progress)) (*join.Preview, error) {
	p, err := c.Preview(ctx, *m.book.Load().Own())
	if err != nil {
		return nil, err
	}
	progress(Progress{Step: fmt.Sprintf("Joining mesh %q through %s (trust domain %s)", p.Mesh, p.Issuer.Name, p.Issuer.TrustDomain)})
	var failed []join.Check
	for _, k := range p.Checks {
		progress(Progress{Check: &k})
		if !k.OK {
			failed = append(failed, k)
		}
	}
	if len(failed) > 0 {
		return p, &join.CheckError{Failed: failed}
	}
	return p, nil
}

// Join makes this cluster a member of the mesh of the token's issuer. Killed at any point, it is finished by repeating it with
// the same token. Errors: join.ErrTampered, ErrWrong, ErrUsed, ErrExpired, *join.CheckError, ErrAlreadyInMesh.
func (m *Mesh) Join(ctx context.Context, token string, progress func(Progress)) (*JoinResult, error) {
	m.opMu.Lock()
	defer m.opMu.Unlock()
	c, done, err := m.dialIssuer(ctx, token)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, e := range m.book.Load().Members() {
		if e.Record.TrustDomain == c.Issuer.Name() {
			progress(Progress{Step: "Already a member"})
			return m.joined(ctx, e.Record), nil
		}
	}
	if others := m.book.Load().Members(); len(others) > 0 {
		return nil, fmt.Errorf("%w (%s and %d more): leave it first", ErrAlreadyInMesh, others[0].Record.Name, len(others)-1)
	}
	if _, err := m.preview(ctx, c, progress); err != nil {
		return nil, err
	}

	progress(Progress{Step: "Redeeming the token"})
	own := *m.book.Load().Own()
	a, err := c.Redeem(ctx, own)
	if err != nil {
		return nil, err
	}
	if a.Self.ID != own.ID || a.Self.Name != own.Name || a.Self.TrustDomain != own.TrustDomain || a.Self.Sponsor != a.Issuer.ID {
		return nil, fmt.Errorf("the issuer admitted %q (member %.8s, trust domain %s), not this cluster", a.Self.Name, a.Self.ID, a.Self.TrustDomain)
	}
	everyone := append([]federation.Record{a.Issuer}, a.Members...)
	if _, err := m.book.Load().Clone().Introduce(a.Issuer.ID, everyone, m.cfg.Now()); err != nil {
		return nil, fmt.Errorf("members of mesh %q: %w", a.Mesh, err)
	}
	err = m.change(ctx, func(b *federation.Book) ([]string, error) {
		r := *b.Own()
		r.Standing, r.Incarnation, r.Sponsor, r.Mesh = federation.Joining, a.Self.Incarnation, a.Issuer.ID, a.Mesh
		r.Admitted, r.Changed, r.Expires, r.Proof = a.Self.Admitted, federation.Stamp(m.cfg.Now()), a.Self.Expires, nil
		if r.Expires.IsZero() { // the issuer has it as a member already: a repeated join
			r.Expires = federation.Stamp(m.cfg.Now().Add(join.TokenLife))
		}
		b.Put(&federation.Entry{Record: r})
		return []string{b.Self}, nil
	})
	if err != nil {
		return nil, err
	}

	progress(Progress{Step: "Confirming"})
	self, members, err := c.Confirm(ctx, a.Self.ID, a.Self.Incarnation)
	if err != nil {
		return nil, err
	}
	err = m.change(ctx, func(b *federation.Book) ([]string, error) {
		changed, err := b.Introduce(a.Issuer.ID, append([]federation.Record{a.Issuer}, members...), m.cfg.Now())
		if err != nil {
			return nil, err
		}
		r := *b.Own()
		r.Standing, r.Incarnation, r.Changed, r.Expires = federation.Joined, self.Incarnation, federation.Stamp(m.cfg.Now()), time.Time{}
		b.Put(&federation.Entry{Record: r})
		return append(changed, b.Self), nil
	})
	if err != nil {
		return nil, err
	}
	m.log.Info("joined a mesh", "mesh", a.Mesh, "through", a.Issuer.Name, "incarnation", self.Incarnation)
	progress(Progress{Step: "Reading what the members export"})
	return m.joined(ctx, a.Issuer), nil
}

// joined waits a while for the first sync with everyone and sums up.
func (m *Mesh) joined(ctx context.Context, issuer federation.Record) *JoinResult {
	ctx, cancel := context.WithTimeout(ctx, syncTime)
	defer cancel()
	for !m.synced() && ctx.Err() == nil {
		updated := m.Updated()
		t := time.NewTimer(50 * time.Millisecond) // the mirror's status has no channel of its own
		select {
		case <-updated:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
	s := m.Status()
	res := &JoinResult{Mesh: s.Mesh, Through: issuer.Name, TrustDomain: issuer.TrustDomain, Members: registry{m}.Members(), Exports: s.Exports}
	for _, ms := range s.Members {
		res.Imports += ms.Exports
		if ms.Record.Standing == federation.Joined {
			res.Accepts = append(res.Accepts, m.accepts(&ms.Record))
		}
	}
	return res
}

// synced reports whether every live member has been read whole.
func (m *Mesh) synced() bool {
	peers := m.currentPeers()
	for _, e := range m.book.Load().Members() {
		if m.disabled(e.Record.Name) {
			continue
		}
		p := peers[e.Record.ID]
		if p == nil || !p.mirror.Status().Synced || p.seen.Load() == nil {
			return false
		}
	}
	return true
}

// accepts says what is believed of a member.
func (m *Mesh) accepts(r *federation.Record) string {
	what := "services of every namespace"
	ids := "SPIFFE IDs of " + r.TrustDomain
	if s := m.local.Load(); s != nil && s.Peers[r.Name] != nil {
		p := s.Peers[r.Name]
		if len(p.Namespaces) > 0 {
			what = fmt.Sprintf("services of namespaces %v", p.Namespaces)
		}
		if len(p.SPIFFEIDs) > 0 {
			ids = fmt.Sprintf("SPIFFE IDs %v of %s", p.SPIFFEIDs, r.TrustDomain)
		}
	}
	if s := m.local.Load(); s != nil && len(s.AllowOf(r.TrustDomain)) > 0 {
		ids += " as its ClusterFederatedTrustDomain allows"
	}
	return fmt.Sprintf("%s: %s, endpoints with %s", r.Name, what, ids)
}

// expireJoining ends a join that nobody finished before the token expired.
func (m *Mesh) expireJoining(ctx context.Context) error {
	if own := m.book.Load().Own(); own.Standing != federation.Joining || m.cfg.Now().Before(own.Expires) {
		return nil
	}
	m.log.Warn("the join was not finished before its token expired; this cluster is in no mesh")
	return m.change(ctx, func(b *federation.Book) ([]string, error) {
		r := *b.Own()
		if r.Standing != federation.Joining {
			return nil, nil
		}
		r.Standing, r.Sponsor, r.Mesh, r.Changed, r.Expires = federation.Joined, "", m.cfg.MeshName, federation.Stamp(m.cfg.Now()), time.Time{}
		b.Put(&federation.Entry{Record: r})
		return []string{b.Self}, nil
	})
}

// LeaveResult is what came of a leave.
type LeaveResult struct {
	Member string
	State  string   // "left", or "proposed" where the others need a person's word
	Told   []string // members that know
	Untold []string // members that learn it from the others
	Note   string
}

// Leave takes this cluster (member is empty or its own name) or, with force, a dead member out of the mesh. Without force at least one member
// must be told; with it, none need be reachable. It may be repeated. Errors: ErrNoSuchMember, ErrNobodyTold, ErrNeedsForce.
func (m *Mesh) Leave(ctx context.Context, member string, force bool) (*LeaveResult, error) {
	if err := m.ready(ctx); err != nil {
		return nil, err
	}
	m.opMu.Lock()
	defer m.opMu.Unlock()
	if own := m.book.Load().Own(); member != "" && member != own.Name && member != own.ID {
		return m.remove(ctx, member, force)
	}
	return m.leave(ctx, force)
}

func (m *Mesh) leave(ctx context.Context, force bool) (*LeaveResult, error) {
	b := m.book.Load()
	left := *b.Own()
	res := &LeaveResult{Member: left.Name, State: string(federation.Left)}
	if left.Standing == federation.Left {
		res.Note = "It had left before."
		return res, nil
	}
	left.Incarnation, left.Standing, left.Changed, left.Bundle = left.Incarnation+1, federation.Left, federation.Stamp(m.cfg.Now()), nil
	if err := signLeft(m.cfg.Source, &left); err != nil {
		return nil, err
	}
	members := b.Members()
	if len(members) > 0 && !force && !m.anyReachable(ctx, members) {
		return nil, fmt.Errorf("%w that this cluster leaves: none answers", ErrNobodyTold)
	}
	if err := m.kv.Put(ctx, leavingKey, left.Bytes()); err != nil {
		return nil, fmt.Errorf("note the leave: %w", err)
	}
	type answer struct {
		name string
		err  error
	}
	answers := make(chan answer, len(members))
	for _, e := range members {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, tellTime)
			defer cancel()
			answers <- answer{e.Record.Name, join.SayLeft(ctx, m.cfg.Source, m.cfg.Dial, e.Record, left)}
		}()
	}
	for range members {
		if a := <-answers; a.err != nil {
			m.log.Warn("member not told of the leave", "cluster", a.name, "error", a.err)
			res.Untold = append(res.Untold, a.name)
		} else {
			res.Told = append(res.Told, a.name)
		}
	}
	slices.Sort(res.Told)
	slices.Sort(res.Untold)
	if len(res.Told) == 0 && len(res.Untold) > 0 {
		res.Note = "Nobody knows yet. On a remaining member run: hanse leave --force " + left.Name
	} else if len(res.Untold) > 0 {
		res.Note = "The members that were told pass it on."
	}
	if err := m.finishLeave(ctx, left); err != nil {
		return nil, err
	}
	return res, m.settle(ctx)
}

// anyReachable probes the federation listeners of members.
func (m *Mesh) anyReachable(ctx context.Context, members []*federation.Entry) bool {
	ctx, cancel := context.WithTimeout(ctx, tellTime)
	defer cancel()
	var targets []string
	for _, e := range members {
		targets = append(targets, e.Record.Addresses...)
	}
	answers := make(chan bool, len(targets))
	for _, a := range targets {
		go func() {
			c, err := m.cfg.Dial(ctx, "tcp", a)
			if err == nil {
				c.Close()
			}
			answers <- err == nil
		}()
	}
	ok := false
	for range targets {
		ok = <-answers || ok
	}
	return ok
}

// finishLeave forgets the mesh. It is the end of leave, or, after a crash in between, of load.
func (m *Mesh) finishLeave(ctx context.Context, left federation.Record) error {
	err := m.change(ctx, func(b *federation.Book) ([]string, error) {
		left.Bundle = b.Own().Bundle
		b.Put(&federation.Entry{Record: left})
		changed := []string{b.Self}
		for id, e := range b.Entries {
			if id != b.Self && e.Record.Standing != federation.Left {
				b.Forget(id)
				changed = append(changed, id)
			}
		}
		return changed, nil
	})
	if err != nil {
		return err
	}
	m.log.Info("left the mesh", "mesh", left.Mesh)
	if err := m.kv.Delete(ctx, leavingKey); err != nil {
		return fmt.Errorf("note the leave: %w", err)
	}
	return nil
}

// resumeLeave finishes a leave that a crash interrupted.
func (m *Mesh) resumeLeave(ctx context.Context) error {
	value, err := m.kv.Get(ctx, leavingKey)
	if err != nil || value == nil {
		return err
	}
	left, err := federation.DecodeRecord(value)
	if err != nil {
		return err
	}
	return m.finishLeave(ctx, left)
}

// remove takes a dead member out.
func (m *Mesh) remove(ctx context.Context, member string, force bool) (*LeaveResult, error) {
	e := m.find(member)
	if e == nil {
		return nil, fmt.Errorf("%w: %q", ErrNoSuchMember, member)
	}
	if !force {
		return nil, fmt.Errorf("%w: cluster %s", ErrNeedsForce, e.Record.Name)
	}
	left := e.Record
	left.Incarnation, left.Standing, left.Changed, left.Bundle = left.Incarnation+1, federation.Left, federation.Stamp(m.cfg.Now()), nil
	if err := signLeft(m.cfg.Source, &left); err != nil {
		return nil, err
	}
	err := m.change(ctx, func(b *federation.Book) ([]string, error) {
		b.Put(&federation.Entry{Record: left})
		return []string{left.ID}, nil
	})
	if err != nil {
		return nil, err
	}
	m.log.Info("cluster removed by an administrator", "cluster", left.Name, "member", left.ID)
	res := &LeaveResult{Member: left.Name, State: string(federation.Left)}
	b := m.book.Load()
	for _, other := range b.Members() {
		res.Untold = append(res.Untold, other.Record.Name)
	}
	slices.Sort(res.Untold)
	if left.Sponsor != b.Self {
		res.State = "proposed"
		res.Note = fmt.Sprintf("It is out here. This cluster did not admit it, so each other member shows it as proposed until: hanse clusters accept %s", left.Name)
	}
	return res, m.settle(ctx)
}

// find returns a member that has not left, by name or ID.
func (m *Mesh) find(member string) *federation.Entry {
	b := m.book.Load()
	for id, e := range b.Entries {
		if id != b.Self && e.Record.Standing != federation.Left && (e.Record.Name == member || id == member) {
			return e
		}
	}
	return nil
}

// AcceptHeld is a person's word on a member: a loss that its mirror holds back is applied, its introduction is accepted, or its leave that
// someone else proposed takes effect. For this cluster itself, a loss that its own exports hold back is let through. Errors: ErrNoSuchMember, ErrNothingHeld.
func (m *Mesh) AcceptHeld(ctx context.Context, member string) error {
	if err := m.ready(ctx); err != nil {
		return err
	}
	accepted := false
	if own := m.book.Load().Own(); member == own.Name || member == own.ID {
		scopes, _ := m.exporting()
		for scope, st := range scopes {
			if st.Held != "" {
				m.term.Load().exporter.Accept(scope)
				accepted = true
			}
		}
		if !accepted {
			return fmt.Errorf("%w of this cluster's exports", ErrNothingHeld)
		}
		return nil
	}
	e := m.find(member)
	if e == nil {
		return fmt.Errorf("%w: %q", ErrNoSuchMember, member)
	}
	err := m.change(ctx, func(b *federation.Book) ([]string, error) {
		if accepted = b.Accept(e.Record.ID); accepted {
			return []string{e.Record.ID}, nil
		}
		return nil, nil
	})
	if err != nil {
		return err
	}
	if p := m.currentPeers()[e.Record.ID]; p != nil && p.mirror.Status().Held != "" {
		p.mirror.Accept()
		accepted = true
	}
	if !accepted {
		return fmt.Errorf("%w of cluster %s", ErrNothingHeld, e.Record.Name)
	}
	return m.settle(ctx)
}

// AnnounceRestart tells the peers that a silence of up to d is planned, and returns when that is written. The next run takes it back.
// A follower has nothing to announce: peers do not listen to it.
func (m *Mesh) AnnounceRestart(ctx context.Context, d time.Duration) error {
	if e := m.term.Load().exporter; e != nil {
		return e.AnnounceRestart(ctx, d)
	}
	return nil
}

// settle waits until the loop has applied everything that was decided before.
func (m *Mesh) settle(ctx context.Context) error {
	done := make(chan struct{})
	select {
	case m.settling <- done:
	case <-ctx.Done():
		return fmt.Errorf("wait for the federation loop: %w", ctx.Err())
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the federation loop: %w", ctx.Err())
	}
}
