package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/kube"
)

// newKube is the source of an API server's objects. It need not be there yet.
func newKube(cfg KubeAPI, log *slog.Logger, reg prometheus.Registerer) (*kube.Source, error) {
	var config *rest.Config
	var err error
	if cfg.Kubeconfig == "" {
		if config, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("kubeAPI: %w (outside a pod: give kubeAPI.kubeconfig)", err)
		}
	} else if config, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(&clientcmd.ClientConfigLoadingRules{ExplicitPath: cfg.Kubeconfig},
		&clientcmd.ConfigOverrides{CurrentContext: cfg.Context}).ClientConfig(); err != nil {
		return nil, fmt.Errorf("kubeAPI.kubeconfig %s: %w", cfg.Kubeconfig, err)
	}
	return kube.New(kube.Config{REST: config, Log: log, Registerer: reg})
}

// kubeView is the view that the API server is told of: none before all that was known has been loaded, or nothing would seem imported.
func (p *controlPlane) kubeView() (*discovery.Clusterset, <-chan struct{}) {
	updated := p.mesh.Updated()
	select {
	case <-p.mesh.Loaded():
		return p.mesh.Clusterset(), updated
	default:
		return nil, p.mesh.Loaded()
	}
}

// lookForOffice is how often a replica sees whether it leads now.
const lookForOffice = time.Second

// whileLeading runs what writes to the API server while this replica leads. Two that write for a moment write the same.
func (p *controlPlane) whileLeading(ctx context.Context, write func(context.Context) error) error {
	for ctx.Err() == nil {
		if p.replicas.leads() {
			term, end := context.WithCancel(ctx)
			go func() {
				defer end()
				for p.replicas.leads() && term.Err() == nil {
					pause(term, lookForOffice)
				}
			}()
			err := write(term)
			end()
			if err != nil {
				return err
			}
		}
		pause(ctx, lookForOffice)
	}
	return nil
}
