package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/drill"
	"github.com/hanse-mesh/hanse/identity"
)

func (p *controlPlane) drillSpec(spec admin.DrillSpec) (admin.DrillSpec, error) {
	spec, err := drill.Complete(spec, p.cfg.Cluster)
	if err != nil {
		return spec, admin.Invalid("hanse drill run --help", "%v", err)
	}
	switch spec.Mode {
	case drill.DistrustRoot:
		td, authority, err := p.findTrust(spec.Root)
		if err != nil {
			return spec, err
		}
		if td == p.td {
			return spec, admin.Refused("hanse drill run --rotate drills the own root", "%s is of this cluster's own trust domain: all would be refused", spec.Root)
		}
		spec.Root = td.Name()
		if authority != "" {
			spec.Root += "/" + authority
		}
	case drill.Rotate:
		if err := p.bySPIRE("rotation", "spire-server localauthority x509 prepare"); err != nil {
			return spec, err
		}
	}
	if spec.Scope.Service != "" {
		name, err := findService(p.mesh.Clusterset(), spec.Scope.Service)
		if err != nil {
			return spec, err
		}
		spec.Scope.Service = name.String()
	}
	return spec, nil
}

// DrillPlan says who would take over.
func (p *controlPlane) DrillPlan(_ context.Context, spec admin.DrillSpec) (admin.DrillPlan, error) {
	spec, err := p.drillSpec(spec)
	if err != nil {
		return admin.DrillPlan{}, err
	}
	return drill.Plan(spec, p.mesh.Clusterset()), nil
}

// DrillRun runs a drill to its end.
func (p *controlPlane) DrillRun(ctx context.Context, spec admin.DrillSpec, emit func(admin.Event) error) (admin.Drill, error) {
	spec, err := p.drillSpec(spec)
	if err != nil {
		return admin.Drill{}, err
	}
	id, err := p.drills.Start(ctx, spec)
	if err != nil {
		return admin.Drill{}, admin.Refused("hanse drill plan shows what would be hit; hanse drill status, what runs", "%v", err)
	}
	last := time.Time{}
	for {
		d, changed, final, err := p.drills.Get(id)
		if err != nil || final {
			return d, err
		}
		if now := p.now(); now.Sub(last) >= time.Second {
			last = now
			ev, err := admin.DrillEvent(d)
			if err == nil {
				err = emit(ev)
			}
			if err != nil {
				return d, p.abandon(id, spec, err)
			}
		}
		select {
		case <-ctx.Done():
			return d, p.abandon(id, spec, ctx.Err())
		case <-changed:
		}
	}
}

// abandon is for a watcher that has gone: its drill goes with it if it asked for that.
func (p *controlPlane) abandon(id string, spec admin.DrillSpec, why error) error {
	if spec.KeepAlive {
		return errors.Join(why, p.drills.Stop(id))
	}
	return why
}

// DrillList is newest first.
func (p *controlPlane) DrillList(context.Context) ([]admin.Drill, error) { return p.drills.List(), nil }

// DrillGet returns one drill.
func (p *controlPlane) DrillGet(_ context.Context, id string) (admin.Drill, error) {
	d, _, _, err := p.drills.Get(id)
	if errors.Is(err, drill.ErrNotFound) {
		return d, admin.NotFound("hanse drill status lists them", "there is no drill %s", id)
	}
	return d, err
}

// DrillStop heals at once.
func (p *controlPlane) DrillStop(ctx context.Context, id string) (admin.Drill, error) {
	if err := p.drills.Stop(id); err != nil {
		return p.DrillGet(ctx, id)
	}
	return p.DrillGet(ctx, id)
}

// drillPlane is what drills do to this control plane.
type drillPlane struct {
	*switchboard
	p *controlPlane

	mu    sync.Mutex
	timer *time.Timer // guarded by mu; heals by itself
}

// Distrust implements drill.ControlPlane. It is in memory only, so that whoever restarts is healed.
func (d *drillPlane) Distrust(root string, length time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.p.source.SetFault(identity.Fault{Distrusted: []string{root}})
	d.timer = time.AfterFunc(length, d.Heal)
}

// Heal implements drill.ControlPlane.
func (d *drillPlane) Heal() {
	d.switchboard.Heal()
	d.p.source.SetFault(identity.Fault{})
}

// Closed implements drill.ControlPlane.
func (d *drillPlane) Closed(since time.Time) int { return d.closed(since) }

// Rotate implements drill.ControlPlane: a rotation by hand, and the revocation of the root before it.
func (d *drillPlane) Rotate(ctx context.Context, moment func(kind, detail string)) error {
	p := d.p
	quiet := func(admin.Event) error { return nil }
	waiting := 0
	r, err := p.TrustRotate(ctx, admin.RotateRequest{}, func(ev admin.Event) error {
		var now admin.Rotation
		if len(ev.Data) == 0 || json.Unmarshal(ev.Data, &now) != nil {
			return nil
		}
		if waiting == 0 {
			moment("prepared", fmt.Sprintf("the next root is in the bundle, sequence %d", now.Sequence))
		}
		waiting = max(waiting, len(now.Missing), 1)
		return nil
	})
	if err != nil {
		return err
	}
	moment("activated", "everybody has loaded the next root, and it signs")
	if r.Old == "" {
		return errors.New("there was no root to replace")
	}
	if _, err := p.leaveOwn(ctx, r.Old, false, maxWait, admin.Distrusted{TrustDomain: p.td.Name()}, &teller{emit: quiet, now: p.now}); err != nil {
		return err
	}
	moment("renewed", "nobody rests on the old root any more")
	out, err := p.announced(ctx, p.now(), distrustWait, admin.Distrusted{TrustDomain: p.td.Name()}, &teller{emit: quiet, now: p.now})
	if err != nil {
		return err
	}
	if len(out.Missing) > 0 {
		return fmt.Errorf("the old root is revoked, but these have not loaded that: %s", strings.Join(out.Missing, ", "))
	}
	moment("dropped", "everybody has loaded the bundle without the old root")
	return nil
}
