package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// Keys of what people have ordered of the roots of all replicas. A replica that is away obeys when it is back.
const (
	rotationKey = "authority/rotation" // a rotation, by who is asked
	revokedPath = "authority/revoked/" // + authority: a revocation, by who is asked, then by the leader
)

// rotation orders each replica to replace its root.
type rotation struct {
	Number int64     `json:"number"`          // grows
	Force  bool      `json:"force,omitempty"` // the new roots sign as soon as they are in the bundle, whoever has not loaded it
	At     time.Time `json:"at"`
	By     string    `json:"by"` // the replica that was asked
}

// revocation takes a root of a replica out of the bundle, whether or not that replica is there: first all are to leave it, then it goes.
type revocation struct {
	Authority string    `json:"authority"` // of its certificate
	KeyID     string    `json:"keyID"`
	JWTKeyID  string    `json:"jwtKeyID"`
	Replica   string    `json:"replica"` // whose it is
	Force     bool      `json:"force,omitempty"`
	Revoked   bool      `json:"revoked,omitempty"`
	At        time.Time `json:"at"`
	Ends      time.Time `json:"ends"` // of the root: what has expired nobody remembers

	rev int64
}

// obeyed is what a replica says of itself: how far it has come with what was ordered.
type obeyed struct {
	Rotation int64               `json:"rotation"`          // number of the last one begun
	Root     string              `json:"root,omitempty"`    // key ID of the root that was prepared for it
	Resting  map[string][]string `json:"resting,omitempty"` // by authority that is to be left: agents that rest on it, as far as this replica knows
}

// namedRoot is a replica's root, without its keys.
type namedRoot struct {
	Authority string    `json:"authority"`
	KeyID     string    `json:"keyID"`
	JWTKeyID  string    `json:"jwtKeyID"`
	Phase     string    `json:"phase"`
	Ends      time.Time `json:"ends"`
}

func namesOf(all []ca.Root) []namedRoot {
	out := make([]namedRoot, 0, len(all))
	for _, x := range all {
		out = append(out, namedRoot{Authority: bundle.AuthorityID(x.Certificate), KeyID: x.KeyID, JWTKeyID: x.JWTKeyID, Phase: x.Phase, Ends: x.Expires.UTC()})
	}
	return out
}

// notStored is the refusal of an order that etcd does not take.
func notStored(what string, err error) error {
	return &admin.Error{Status: http.StatusServiceUnavailable, Message: fmt.Sprintf("%s: etcd does not answer, and nothing was changed: %v", what, err),
		Hint: "hanse status says how etcd is; try again when it answers"}
}

// orderRotation orders a rotation, unless one is under way: then it is that one, which force makes faster. It returns the number.
func (r *roots) orderRotation(ctx context.Context, force bool) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, distrustTime)
	defer cancel()
	kv := etcd.NewKV(r.store, "")
	for {
		value, rev, err := kv.Get(ctx, rotationKey)
		if err != nil {
			return 0, notStored("rotate", err)
		}
		var o rotation
		if value != nil {
			if err := json.Unmarshal(value, &o); err != nil { // nobody obeys it
				o = rotation{Number: r.highest()}
			}
		}
		if behind, _ := r.rotating(o.Number); o.Number > 0 && len(behind) > 0 {
			if o.Force || !force {
				return o.Number, nil
			}
			o.Force = true
		} else {
			o = rotation{Number: o.Number + 1, Force: force, At: r.now().UTC().Truncate(time.Second), By: r.replicas.self.Name}
		}
		if value, err = json.Marshal(o); err != nil {
			return 0, err
		}
		ok, _, err := kv.CompareAndPut(ctx, rotationKey, value, rev)
		if err != nil {
			return 0, notStored("rotate", err)
		}
		if ok {
			r.log.Info("rotation ordered", "number", o.Number, "force", o.Force)
			return o.Number, nil
		}
	}
}

// highest is the number of the last rotation that any replica has begun.
func (r *roots) highest() (number int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.records {
		number = max(number, rec.Obeyed.Rotation)
	}
	return number
}

// rotating names the replicas that are there and have not finished that rotation, and those that are away and have not.
func (r *roots) rotating(number int64) (behind, away []string) {
	here := r.replicas.here()
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, rec := range r.records {
		phase := ""
		for _, x := range rec.Roots {
			if x.KeyID == rec.Obeyed.Root {
				phase = x.Phase
			}
		}
		switch {
		case rec.Obeyed.Rotation > number || rec.Obeyed.Rotation == number && phase != "prepared":
		case here[id]:
			behind = append(behind, "replica "+rec.Name)
		default:
			away = append(away, rec.Name)
		}
	}
	slices.Sort(behind)
	slices.Sort(away)
	return behind, away
}

// begun waits until this replica has begun that rotation, and returns the root that it made for it.
func (r *roots) begun(ctx context.Context, number int64) (root ca.Root, err error) {
	ctx, cancel := context.WithTimeout(ctx, distrustTime)
	defer cancel()
	for {
		r.mu.Lock()
		done := r.done
		r.mu.Unlock()
		if done.Rotation >= number {
			for _, x := range r.authority.Roots() {
				if x.KeyID == done.Root || done.Root == "" && x.Phase != "old" {
					return x, nil
				}
			}
			return ca.Root{}, admin.Refused("hanse trust show says what is", "the prepared root was withdrawn by somebody else")
		}
		select {
		case <-ctx.Done():
			return ca.Root{}, fmt.Errorf("the rotation is ordered, and not begun here yet: %w", ctx.Err())
		case <-time.After(lookAgain / 10):
		}
	}
}

// find looks for a root of any replica by its authority or JWT key ID.
func (r *roots) find(authority string) (root namedRoot, owner string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, rec := range r.records {
		for _, x := range rec.Roots {
			if x.Authority == authority || x.JWTKeyID == authority {
				return x, id, true
			}
		}
	}
	return namedRoot{}, "", false
}

// owned says whose root it is.
type owned struct {
	replica, phase string
	away           bool
}

// owners says it of all, by authority.
func (r *roots) owners() map[string]owned {
	here := r.replicas.here()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]owned{}
	for id, rec := range r.records {
		for _, x := range rec.Roots {
			out[x.Authority] = owned{replica: rec.Name, phase: x.Phase, away: !here[id]}
		}
	}
	return out
}

// ordered is the revocation of an authority, if there is one.
func (r *roots) ordered(authority string) (revocation, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range r.revoked {
		if v.Authority == authority || v.JWTKeyID == authority {
			return v, true
		}
	}
	return revocation{}, false
}

// revokedLike resolves the beginning of the name of an authority that is revoked, and in no bundle any more.
func (r *roots) revokedLike(prefix string) (string, bool) {
	prefix = strings.ToLower(prefix)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range r.revoked {
		if len(prefix) >= 8 && (strings.HasPrefix(v.Authority, prefix) || strings.HasPrefix(v.KeyID, prefix) || strings.HasPrefix(strings.ToLower(v.JWTKeyID), prefix)) {
			return v.Authority, true
		}
	}
	return "", false
}

// orderRevocation orders the revocation of a root; the same again changes nothing, but for force.
func (r *roots) orderRevocation(ctx context.Context, root namedRoot, owner string, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, distrustTime)
	defer cancel()
	kv := etcd.NewKV(r.store, revokedPath)
	for {
		value, rev, err := kv.Get(ctx, root.Authority)
		if err != nil {
			return notStored("revoke", err)
		}
		v := revocation{Authority: root.Authority, KeyID: root.KeyID, JWTKeyID: root.JWTKeyID, Replica: owner, At: r.now().UTC().Truncate(time.Second), Ends: root.Ends}
		if value != nil {
			if err := json.Unmarshal(value, &v); err != nil {
				return nil // it is damaged, and obeyed by its key
			}
			if v.Force || v.Revoked || !force {
				return nil
			}
		}
		v.Force = force
		if value, err = json.Marshal(v); err != nil {
			return err
		}
		ok, _, err := kv.CompareAndPut(ctx, root.Authority, value, rev)
		if err != nil {
			return notStored("revoke", err)
		}
		if ok {
			r.log.Warn("revocation of a root ordered", "authority", root.Authority, "replica", owner, "force", force)
			return nil
		}
	}
}

// leaving names the agents that still rest on an authority that is to be left, and the replicas that have not said.
func (r *roots) leaving(authority string) []string {
	alive := *r.replicas.seen.Load()
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, x := range alive {
		names, ok := r.records[x.ID].Obeyed.Resting[authority]
		if !ok {
			names = []string{"replica " + x.Name}
		}
		out = append(out, names...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// left are the key IDs, X.509 and JWT, of roots of all replicas that agents are to leave.
func (r *roots) left() map[string]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]bool{}
	for _, v := range r.revoked {
		out[v.KeyID], out[v.JWTKeyID] = true, true
	}
	return out
}

// obeying does what is ordered until ctx ends.
func (r *roots) obeying(ctx context.Context) {
	for {
		again, err := r.obey(ctx)
		if err != nil && ctx.Err() == nil {
			r.log.Error("what is ordered of this replica's roots is not done; tried again", "err", err)
			pause(ctx, time.Second)
			again = true
		}
		var tick <-chan time.Time
		if again {
			tick = time.After(lookAgain)
		}
		select {
		case <-ctx.Done():
			return
		case <-r.told:
		case <-tick:
		}
	}
}

// obey does what is ordered, and says so; again: there is more to come.
func (r *roots) obey(ctx context.Context) (again bool, err error) {
	r.mu.Lock()
	order, revoked, leave, was, lost := r.rotation, r.revoked, r.leave, r.done, r.lost
	r.mu.Unlock()
	if err := r.restore(ctx, lost); err != nil {
		return true, err
	}
	done := obeyed{Rotation: was.Rotation, Root: was.Root}
	if order.Number > done.Rotation {
		root, err := r.authority.Rotate()
		if err != nil {
			return false, err
		}
		done.Rotation, done.Root = order.Number, root.KeyID
		r.log.Info("rotation begun, as ordered", "number", order.Number, "by", order.By, "key_id", root.KeyID)
	}
	if order.Force && order.Number == done.Rotation && r.phase(done.Root) == "prepared" {
		if r.Included(r.authority.Sequence()) == 0 {
			again = true
		} else if err := r.authority.ActivateRoot(done.Root); err != nil && !errors.Is(err, ca.ErrWrongPhase) {
			return again, err
		}
	}
	for _, v := range revoked {
		if err := r.drop(v); err != nil {
			return again, err
		}
		if !v.Revoked {
			again = true
			if sequence := leave[v.Authority]; sequence > 0 && r.resting != nil {
				if done.Resting == nil {
					done.Resting = map[string][]string{}
				}
				done.Resting[v.Authority] = few(r.resting(v.KeyID, sequence))
			}
		}
	}
	r.mu.Lock()
	said := r.said // also of what was done before and could not be said
	r.done = done
	r.mu.Unlock()
	if done.Rotation == said.Rotation && maps.EqualFunc(done.Resting, said.Resting, slices.Equal) {
		return again, nil
	}
	return again, r.publish(ctx)
}

// few are not more names than anybody reads.
func few(names []string) []string {
	if n := len(names) - maxNamed; n > 0 {
		return append(slices.Clone(names[:maxNamed]), fmt.Sprintf("%d more agents", n))
	}
	return append([]string{}, names...)
}

func (r *roots) phase(keyID string) string {
	for _, x := range r.authority.Roots() {
		if x.KeyID == keyID {
			return x.Phase
		}
	}
	return ""
}

// drop brings this replica's root, if it is one, as far as the revocation is.
func (r *roots) drop(v revocation) error {
	for _, x := range r.authority.Roots() {
		if bundle.AuthorityID(x.Certificate) != v.Authority {
			continue
		}
		if x.Phase == "active" { // it was ordered while this replica was away
			if err := r.authority.Retire(x.KeyID); err != nil {
				return err
			}
		}
		var err error
		switch {
		case x.Phase == "prepared":
			err = r.authority.Withdraw(x.KeyID)
		case v.Revoked:
			err = r.authority.Revoke(x.KeyID)
		case !x.Tainted && x.Phase == "old":
			err = r.authority.Taint(x.KeyID)
		}
		if err != nil && !errors.Is(err, ca.ErrWrongPhase) && !errors.Is(err, ca.ErrUnknownRoot) {
			return err
		}
	}
	return nil
}

// decide lets revocations go on, as the leader: when nobody rests on the root any more, or by force.
func (r *roots) decide(ctx context.Context) error {
	r.mu.Lock()
	revoked := maps.Clone(r.revoked)
	r.mu.Unlock()
	kv := etcd.NewKV(r.leader, revokedPath)
	for authority, v := range revoked {
		now := r.now()
		switch {
		case !v.Ends.IsZero() && now.After(v.Ends):
			if _, err := kv.CompareAndDelete(ctx, authority, v.rev); err != nil {
				return err
			}
		case v.Revoked || len(r.leaving(authority)) > 0 && (!v.Force || now.Sub(v.At) < agentSyncTime):
		default:
			v.Revoked = true
			value, err := json.Marshal(v)
			if err != nil {
				return err
			}
			if _, _, err := kv.CompareAndPut(ctx, authority, value, v.rev); err != nil {
				return err
			}
			r.log.Warn("root revoked", "authority", authority, "replica", v.Replica, "force", v.Force)
		}
	}
	return nil
}
