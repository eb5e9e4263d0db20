# The pocket model from nothing: a rule for each thing that is made. `make pocket` makes what is
# missing; interrupted, it goes on where it was. With -j2 parts that do not need each other are made
# side by side. POCKET=FOLDER makes another one beside it, SEED=N from other random numbers, and
# TEACHER=pocket/weights takes the teacher that is there, and makes the stages only. `make
# pocket-report` then samples and measures what pocket/results.md shows.

POCKET ?= outputs/pocket
SEED ?= 0
RUN := $(BIN)/python -m
# of a part; what is changed in a config must come after it
PRETRAIN = $(RUN) pocket.pretrain --config=pocket/pretrain_config.py:$(1) --config.folder=$(POCKET) \
	--config.seed=$(SEED)
# what the stages have in common
STAGE = --config.checkpoint=$(POCKET)/ltx2 --config.seed=$(SEED)

# A folder whose teacher was given goes on with that one.
ifndef TEACHER
TEACHER := $(shell cat $(POCKET)/teacher.txt 2>/dev/null)
endif

ifndef TEACHER
pocket: $(POCKET)/reconstruction.done
endif
pocket: $(POCKET)/student.safetensors $(POCKET)/curves.png
	@echo
	@echo "$(POCKET)/student.safetensors   the student; pocket.demo streams from $(POCKET)/stage3_student"
	@echo "$(POCKET)/curves.png            how it learnt"

# The text tower is random, and stays so. The shipped one is the one the teacher learnt with.
ifdef TEACHER
TOWER := $(TEACHER)/gemma
else
TOWER := $(POCKET)/gemma_hf
endif

$(POCKET)/gemma_hf/config.json: $(VENV)/.installed-pocket
	$(RUN) pocket.make_world --format words --output $(POCKET)/words.txt --overwrite
	$(RUN) checkpoint_converters.synthetic_gemma --size pocket --words $(POCKET)/words.txt \
		--dtype float32 --output $(POCKET)/gemma_hf --overwrite

$(POCKET)/gemma/config.json: $(TOWER)/config.json | $(VENV)/.installed-pocket
	$(RUN) checkpoint_converters.gemma3 --input $(TOWER) --output $(POCKET)/gemma --overwrite

$(POCKET)/video_vae.safetensors $(POCKET)/audio_vae.safetensors: $(POCKET)/%.safetensors: | $(POCKET)/gemma/config.json
	$(call PRETRAIN,$*)

$(POCKET)/vocoder.safetensors: $(POCKET)/audio_vae.safetensors
	$(call PRETRAIN,vocoder)

$(POCKET)/causal_decoder.safetensors: $(POCKET)/video_vae.safetensors
	$(call PRETRAIN,causal_decoder)

$(POCKET)/teacher.safetensors: $(POCKET)/video_vae.safetensors $(POCKET)/audio_vae.safetensors
	$(call PRETRAIN,teacher)

ifdef TEACHER
LTX2 := $(addprefix $(TEACHER)/,teacher.safetensors shared.safetensors)
else
LTX2 := $(POCKET)/ltx2.safetensors
endif

$(POCKET)/ltx2.safetensors: $(POCKET)/teacher.safetensors $(POCKET)/vocoder.safetensors
	$(RUN) pocket.assemble --folder $(POCKET) --output $@ --overwrite

# The causal decoder is compared with the other here; it is not good enough to stream with.
$(POCKET)/reconstruction.done: $(POCKET)/vocoder.safetensors $(POCKET)/causal_decoder.safetensors
	$(RUN) pocket.reconstruct --folder $(POCKET) --frames 49 --output $(POCKET)/reconstruction
	@touch $@

$(POCKET)/ltx2/config.json: $(LTX2) | $(VENV)/.installed-pocket
	@mkdir -p $(POCKET)
	@$(if $(TEACHER),echo $(TEACHER) > $(POCKET)/teacher.txt)
	$(RUN) checkpoint_converters.ltx2 --input $(LTX2) --output $(POCKET)/ltx2 --overwrite

# Trajectories take 40 steps each, so stage II has fewer captions than the others.
CAPTIONS_prompts := 1024
CAPTIONS_ode_prompts := 160

$(POCKET)/prompts.done $(POCKET)/ode_prompts.done: $(POCKET)/%.done: $(POCKET)/ltx2/config.json | $(POCKET)/gemma/config.json
	$(RUN) pocket.make_world --format captions --clips $(CAPTIONS_$*) --output $(POCKET)/$*.txt \
		--overwrite
	$(RUN) launch.encode_prompts --gemma $(POCKET)/gemma --checkpoint $(POCKET)/ltx2 \
		--prompts $(POCKET)/$*.txt --output $(POCKET)/$*
	@touch $@

$(POCKET)/stage1.done: $(POCKET)/prompts.done
	$(RUN) launch.stage1 --config=configs/stage1.py:pocket $(STAGE) \
		--config.data=$(POCKET)/prompts --workdir=$(POCKET)/stage1
	@touch $@

$(POCKET)/ode_pairs.done: $(POCKET)/stage1.done $(POCKET)/ode_prompts.done
	$(RUN) launch.ode_pairs --text $(POCKET)/ode_prompts --checkpoint $(POCKET)/ltx2 \
		--generator $(POCKET)/stage1 --layout prefix --batch-size 8 --clips-per-shard 64 --output $(POCKET)/ode_pairs
	@touch $@

STAGE2 = $(RUN) launch.stage2 --config=configs/stage2.py:pocket $(STAGE) \
	--config.data=$(POCKET)/ode_pairs --config.generator=$(POCKET)/stage1 --workdir=$(basename $@)
STAGE3 = $(RUN) launch.stage3 --config=configs/stage3.py:pocket $(STAGE) \
	--config.data=$(POCKET)/prompts --config.generator=$(POCKET)/stage2 --workdir=$(basename $@)

$(POCKET)/stage2.done: $(POCKET)/ode_pairs.done
	$(STAGE2)
	@touch $@

$(POCKET)/stage3.done: $(POCKET)/stage2.done
	$(STAGE3)
	@touch $@

# Other ways to train the stages, for the report: the prefix merged with the first block; scores that
# see a block with its past only; guidance drawn anew for every sample.
MERGED = --config.clip.layout=merged --config.clip.blocks=2
stage3_merged = $(MERGED) --config.rollout_blocks=2 --config.generator=$(POCKET)/stage2_merged
stage3_causal_scores = --config.score.context=block_causal
stage3_random_guidance = '--config.score.video_cfg=(1.0, 2.0)' '--config.score.audio_cfg=(1.0, 2.0)'

$(POCKET)/stage2_merged.done: $(POCKET)/ode_pairs.done
	$(STAGE2) $(MERGED)
	@touch $@

$(POCKET)/stage3_merged.done: $(POCKET)/stage2_merged.done
$(POCKET)/stage3_causal_scores.done $(POCKET)/stage3_random_guidance.done: $(POCKET)/stage2.done

$(foreach name,merged causal_scores random_guidance,$(POCKET)/stage3_$(name).done): $(POCKET)/stage3_%.done:
	$(STAGE3) $(stage3_$*)
	@touch $@

$(POCKET)/stage%_student/config.json: $(POCKET)/stage%.done
	$(RUN) launch.export_run --run $(POCKET)/stage$* --output $(@D) --overwrite

# the transformer alone; all else is the teacher's
$(POCKET)/student.safetensors: $(POCKET)/stage3_student/config.json
	$(RUN) checkpoint_converters.export --input $(<D) --components transformer --output $@ --overwrite

$(POCKET)/curves.png: $(POCKET)/stage3.done
	$(RUN) launch.plot_run $(POCKET)/stage1 $(POCKET)/stage2 $(POCKET)/stage3 --output $@

# Rows of the report: what is sampled, for captions that training has not met. A clip is as long as
# those of training; the long ones are measured by stretches as well.
REPORT := $(POCKET)/report
SEEDS ?= 0 1 2
CLIPS ?= 64
SHORT = --seconds 2 --clips $(CLIPS)
LONG = --seconds 120 --every 5 --clips 4 --batch-size 4 --show 1 --no-speed --sampler stream
ROW_world = --sampler world $(SHORT)
ROW_chance = --sampler chance $(SHORT)
ROW_chance_one_ball = $(ROW_chance) --balls 1
ROW_chance_two_balls = $(ROW_chance) --balls 2
ROW_teacher = --checkpoint $(POCKET)/ltx2 --sampler teacher --cfg 1.5 $(SHORT)
ROW_teacher_4_steps = $(ROW_teacher) --steps 4
ROW_stage1 = --checkpoint $(POCKET)/stage1_student --sampler few-step $(SHORT)
ROW_stage1_causal = --checkpoint $(POCKET)/stage1_student --sampler stream --layout prefix $(SHORT)
ROW_stage2 = --checkpoint $(POCKET)/stage2_student --sampler stream $(SHORT)
ROW_stage3 = --checkpoint $(POCKET)/stage3_student --sampler stream $(SHORT)
ROW_stage3_one_ball = $(ROW_stage3) --balls 1
ROW_stage3_two_balls = $(ROW_stage3) --balls 2
ROW_stage3_other_sound = $(ROW_stage3) --other-sound
ROW_stage3_one_ball_other_sound = $(ROW_stage3_one_ball) --other-sound
ROW_stage3_two_balls_other_sound = $(ROW_stage3_two_balls) --other-sound
ROW_stage2_merged = --checkpoint $(POCKET)/stage2_merged_student --sampler stream $(SHORT)
ROW_stage3_merged = --checkpoint $(POCKET)/stage3_merged_student --sampler stream $(SHORT)
ROW_stage3_causal_scores = --checkpoint $(POCKET)/stage3_causal_scores_student --sampler stream $(SHORT)
ROW_stage3_random_guidance = --checkpoint $(POCKET)/stage3_random_guidance_student --sampler stream $(SHORT)
ROW_long_stage2_merged = --checkpoint $(POCKET)/stage2_merged_student $(LONG)
ROW_long_stage3_merged = --checkpoint $(POCKET)/stage3_merged_student $(LONG)
ROW_long_stage2 = --checkpoint $(POCKET)/stage2_student $(LONG)
ROW_long_stage3 = --checkpoint $(POCKET)/stage3_student $(LONG)
ROW_long_window_3 = $(ROW_long_stage3) --window 3
ROW_long_anchor = $(ROW_long_stage3) --anchors 1
ROW_long_absolute = $(ROW_long_stage3) --positions absolute
BOUNDS := world chance chance_one_ball chance_two_balls
QUALITY := $(BOUNDS) teacher teacher_4_steps stage1 stage1_causal stage2 stage3 stage3_other_sound \
	stage3_one_ball stage3_one_ball_other_sound stage3_two_balls stage3_two_balls_other_sound \
	stage2_merged stage3_merged stage3_causal_scores stage3_random_guidance
DRIFT := long_stage2 long_stage3 long_window_3 long_anchor long_absolute long_stage2_merged \
	long_stage3_merged

pocket-report: $(REPORT)/quality.md $(REPORT)/drift.md

$(REPORT)/quality.md: $(foreach row,$(QUALITY),$(foreach seed,$(SEEDS),$(REPORT)/$(row)/$(seed)/measures.json))
	$(RUN) pocket.report $(addprefix $(REPORT)/,$(QUALITY)) --output $(basename $@)

$(REPORT)/drift.md: $(foreach row,$(DRIFT),$(foreach seed,$(SEEDS),$(REPORT)/$(row)/$(seed)/measures.json))
	$(RUN) pocket.report $(addprefix $(REPORT)/,$(DRIFT)) --output $(basename $@)

$(foreach row,$(BOUNDS),$(foreach seed,$(SEEDS),$(REPORT)/$(row)/$(seed)/measures.json)): $(REPORT)/%/measures.json: | $(VENV)/.installed-pocket
	$(RUN) pocket.sample $(ROW_$(call row_of,$*)) --seed $(notdir $*) --output $(@D)

# stem: ROW/SEED; a row needs the checkpoint that it samples, which is its second word
row_of = $(firstword $(subst /, ,$(1)))
.PRECIOUS: $(POCKET)/stage%_student/config.json  # or make deletes it as a file in between
.SECONDEXPANSION:
$(REPORT)/%/measures.json: $$(word 2,$$(ROW_$$(call row_of,$$*)))/config.json | $(POCKET)/gemma/config.json
	$(RUN) pocket.sample --text-encoder $(POCKET)/gemma $(ROW_$(call row_of,$*)) \
		--seed $(notdir $*) --output $(@D)

# The paper's Table 3: stage II again, with other stabilisers, in another dtype, or from stage I's
# weights read by other conventions than they were trained with (`mismatched`: rotation and gate scale
# of OmniForcing's public code).
ABLATION_STEPS ?= 150
sinks = --config.student.num_sinks=$(1)
OPTION_sinks_0 = $(call sinks,0)
OPTION_sinks_1 = $(call sinks,1)
OPTION_sinks_2 = $(call sinks,2)
OPTION_sinks_4 = $(call sinks,4)
OPTION_sinks_8 = $(call sinks,8)
OPTION_sinks_16 = $(call sinks,16)
OPTION_sinks_24 = $(call sinks,24)
OPTION_incremental = $(call sinks,16) --config.student.sink_rope=incremental
OPTION_qk_norm = $(call sinks,0) --config.student.extra_qk_norm=True
OPTION_tanh_gate = $(call sinks,0) --config.student.tanh_gated_attention=True
OPTION_mismatched_sinks_0 = $(call sinks,0) --config.generator=$(POCKET)/mismatched
OPTION_mismatched_sinks_16 = $(call sinks,16) --config.generator=$(POCKET)/mismatched
OPTIONS := sinks_0 sinks_1 sinks_2 sinks_4 sinks_8 sinks_16 sinks_24 incremental qk_norm tanh_gate \
	mismatched_sinks_0 mismatched_sinks_16
ABLATIONS := $(foreach dtype,float32 bfloat16,$(addsuffix _$(dtype),$(OPTIONS)))

pocket-ablations: $(POCKET)/ablations.md

$(POCKET)/ablations.md: $(foreach seed,$(SEEDS),$(foreach row,$(ABLATIONS),$(POCKET)/ablations/$(row)/$(seed).done))
	$(RUN) pocket.report --runs $(addprefix $(POCKET)/ablations/,$(ABLATIONS)) --output $(basename $@)

$(POCKET)/mismatched/config.json: $(POCKET)/stage1_student/config.json
	rm -rf $(@D) $(@D).partial
	cp -r $(<D) $(@D).partial
	$(BIN)/python -c "import json; p = '$(@D).partial/config.json'; c = json.load(open(p)); \
		c['config']['transformer'] |= {'rope_type': 'interleaved', 'av_ca_timestep_scale_multiplier': 1}; \
		c.pop('checksum', None); \
		json.dump(c, open(p, 'w'), indent=1)"
	touch $(@D).partial/config.json
	mv $(@D).partial $(@D)

# stem: OPTION_DTYPE/SEED. Every step is recorded, so that no spike is missed; seeds share what was
# compiled.
$(POCKET)/ablations/%.done: $(POCKET)/ode_pairs.done $(POCKET)/mismatched/config.json
	JAX_COMPILATION_CACHE_DIR=$(POCKET)/compiled \
		$(RUN) launch.stage2 --config=configs/stage2.py:pocket --config.num_steps=$(ABLATION_STEPS) \
		--config.batch_size=4 --config.log_every=1 \
		--config.checkpoint=$(POCKET)/ltx2 --config.data=$(POCKET)/ode_pairs \
		--config.generator=$(POCKET)/stage1 --config.seed=$(notdir $*) --config.sample_every=$(ABLATION_STEPS) \
		--config.compute.dtype=$(lastword $(subst _, ,$(patsubst %/,%,$(dir $*)))) \
		$(OPTION_$(subst _float32,,$(subst _bfloat16,,$(patsubst %/,%,$(dir $*))))) \
		--workdir=$(POCKET)/ablations/$*
	@touch $@

# Adapters of several ranks beside full training: the same teacher, captions and steps, a third of
# those of `make pocket`. Stem: RANK/SEED.
RANKS ?= 4 16 64 full
RANK_STEPS ?= 100
RANKED := $(POCKET)/ranks
RANK_CONFIG = $(if $(filter full/,$(dir $*)),pocket,pocket-lora '--config.adapters.ranks=($(patsubst %/,%,$(dir $*)),)')
RANK_STAGE = JAX_COMPILATION_CACHE_DIR=$(POCKET)/compiled $(RUN) launch.$(1) \
	--config=configs/$(1).py:$(RANK_CONFIG) --config.checkpoint=$(POCKET)/ltx2 \
	--config.seed=$(notdir $*) --config.num_steps=$(RANK_STEPS) --config.log_every=1 \
	--workdir=$(RANKED)/$(1)/$*

pocket-ranks: $(RANKED)/measures.md $(RANKED)/runs.md

$(RANKED)/stage1/%.done: $(POCKET)/prompts.done
	$(call RANK_STAGE,stage1) --config.data=$(POCKET)/prompts
	@touch $@

$(RANKED)/ode_pairs/%.done: $(RANKED)/stage1/%.done $(POCKET)/ode_prompts.done
	$(RUN) launch.ode_pairs --text $(POCKET)/ode_prompts --checkpoint $(POCKET)/ltx2 \
		--generator $(RANKED)/stage1/$* --layout prefix --batch-size 8 --clips-per-shard 64 \
		--output $(RANKED)/ode_pairs/$*
	@touch $@

$(RANKED)/stage2/%.done: $(RANKED)/ode_pairs/%.done
	$(call RANK_STAGE,stage2) --config.data=$(RANKED)/ode_pairs/$* \
		--config.generator=$(RANKED)/stage1/$*
	@touch $@

$(RANKED)/stage3/%.done: $(RANKED)/stage2/%.done
	$(call RANK_STAGE,stage3) --config.data=$(POCKET)/prompts --config.generator=$(RANKED)/stage2/$*
	@touch $@

$(RANKED)/clips/%/measures.json: $(RANKED)/stage3/%.done
	$(RUN) launch.export_run --run $(RANKED)/stage3/$* --output $(RANKED)/students/$* --overwrite
	$(RUN) pocket.sample --text-encoder $(POCKET)/gemma --checkpoint $(RANKED)/students/$* \
		--sampler stream $(SHORT) --no-speed --seed $(notdir $*) --output $(@D)

RANK_RUNS := $(foreach seed,$(SEEDS),$(addsuffix /$(seed),$(RANKS)))
.PRECIOUS: $(foreach part,stage1 ode_pairs stage2 stage3,$(RANKED)/$(part)/%.done)

$(RANKED)/measures.md: $(foreach run,$(RANK_RUNS),$(RANKED)/clips/$(run)/measures.json)
	$(RUN) pocket.report $(addprefix $(RANKED)/clips/,$(RANKS)) --output $(basename $@)

$(RANKED)/runs.md: $(foreach run,$(RANK_RUNS),$(RANKED)/stage3/$(run).done)
	$(RUN) pocket.report --runs $(addprefix $(RANKED)/stage3/,$(RANKS)) --output $(basename $@)

# The shipped teacher and student beside true clips, by one program.
EVALUATION := outputs/pocket-evaluation
EVALUATED ?= 16

pocket-evaluate: $(VENV)/.installed-pocket
	@mkdir -p $(EVALUATION)
	for name in teacher student; do \
		$(RUN) checkpoint_converters.ltx2 --output $(EVALUATION)/$$name --overwrite \
			--input pocket/weights/$$name.safetensors pocket/weights/shared.safetensors || exit; \
	done
	$(RUN) checkpoint_converters.gemma3 --input pocket/weights/gemma --output $(EVALUATION)/gemma \
		--overwrite
	$(RUN) pocket.make_world --format captions --split test --clips $(EVALUATED) \
		--output $(EVALUATION)/prompts.txt --overwrite
	$(RUN) pocket.make_world --split test --clips $(EVALUATED) --frames 49 \
		--output $(EVALUATION)/world --overwrite
	$(RUN) pocket.evaluate world=$(EVALUATION)/world --prompts $(EVALUATION)/prompts.txt \
		--common "--text-encoder $(EVALUATION)/gemma --dtype float32" \
		--sampler "teacher=--checkpoint $(EVALUATION)/teacher" \
		--sampler "student=--checkpoint $(EVALUATION)/student --seconds 2.0417" \
		--output $(EVALUATION)/tables
	@echo
	@echo "$(EVALUATION)/tables/page.html   the table, with clips side by side"
