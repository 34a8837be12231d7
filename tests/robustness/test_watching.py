"""What watching omega costs, beside an update of a model so small that everything else is at its cheapest."""

import time

from fairseq.trainer import Trainer

from admin_fairseq import watch


def test_watching_costs_less_than_a_hundredth_of_an_update(build, tmp_path):
    model, task, cfg = build("transformer_admin", "--save-dir", str(tmp_path), "--admin-init", "logn")
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    samples = [next(trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=False))]
    trainer.lr_step(1)
    trainer.train_step(samples)

    def seconds(function, times):
        started = time.process_time()
        for _ in range(times):
            function()
        return (time.process_time() - started) / times

    update = min(seconds(lambda: trainer.train_step(samples), 3) for _ in range(2))
    look = []
    for number in (201, 202):
        trainer.set_num_updates(number)
        look.append(min(seconds(lambda: watch.watch_omega(trainer), 5) for _ in range(3)))
    assert look[0] / watch.EVERY + look[1] < update / 100, (look, update)
    print(f"watching takes {(look[0] / watch.EVERY + look[1]) / update:.3%} of an update")
