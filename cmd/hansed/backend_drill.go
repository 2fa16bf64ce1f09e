package main

import (
	"context"
	"errors"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/drill"
)

func (p *controlPlane) drillSpec(spec admin.DrillSpec) (admin.DrillSpec, error) {
	spec, err := drill.Complete(spec, p.cfg.Cluster)
	if err != nil {
		return spec, admin.Invalid("hanse drill run --help", "%v", err)
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
