package peering

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/discovery"
)

// collector turns Status into metrics when it is asked.
type collector struct {
	m *Mesh

	state, lag, age, services, endpoints, faults, probe, alarms *prometheus.Desc
}

func newCollector(m *Mesh) *collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("hanse_federation_"+name, help, labels, nil)
	}
	return &collector{
		m:         m,
		state:     desc("peer_state", "1 for the state of a peer as it is now.", "cluster", "state"),
		lag:       desc("mirror_lag_revisions", "Revisions of the peer that are not here yet.", "cluster"),
		age:       desc("mirror_age_seconds", "Since the peer's last answer.", "cluster"),
		services:  desc("imported_services", "Services imported.", "cluster"),
		endpoints: desc("imported_endpoints", "Endpoints imported.", "cluster"),
		faults:    desc("refused_objects", "Objects that are refused now; empty cluster: own ones that cannot be exported.", "cluster"),
		probe:     desc("probe_success", "Whether the last probe of the data path, with SVIDs, succeeded.", "cluster"),
		alarms:    desc("alarms", "Things that a person should look at: hanse clusters."),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, out) }

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := c.m.Status()
	gauge(c.alarms, float64(len(s.Alarms)))
	gauge(c.faults, float64(len(s.Faults)), "")
	for _, ms := range s.Members {
		name := ms.Record.Name
		switch discovery.PeerState(ms.State) {
		case discovery.Fresh, discovery.Suspect, discovery.Withdrawn:
		default:
			continue
		}
		gauge(c.state, 1, name, ms.State)
		if lag, ok := ms.Lag(); ok {
			gauge(c.lag, float64(lag), name)
		}
		if ms.SeenAge >= 0 {
			gauge(c.age, ms.SeenAge.Seconds(), name)
		}
		gauge(c.services, float64(ms.Exports), name)
		gauge(c.endpoints, float64(ms.Endpoints), name)
		gauge(c.faults, float64(len(ms.Faults)), name)
		if ms.Probe.Known {
			v := 0.0
			if ms.Probe.OK {
				v = 1
			}
			gauge(c.probe, v, name)
		}
	}
}
